#!/usr/bin/env bash
# Everything there is to run on a GPU, in parts of less than ten minutes that can be repeated one by one:
#
#   bash benchmarks/gpu_suite.sh OUT                  all parts that OUT does not hold yet
#   bash benchmarks/gpu_suite.sh OUT probe head       these parts only
#
# Parts: build probe tests kernels head gae peers peers_large tolerance memcheck racecheck. Needs torch 2.11 or newer,
# triton, pytest and, for build, a C++ compiler, pybind11 and ninja; nvcc makes the CUDA kernels. Nothing is downloaded.
# The parts with peers measure beside whoever is installed, or unpacked in RLHF_KERNELS_PEERS (benchmarks/pack_peers.py). A part that fails is
# said so at the end, in the exit status and in OUT/<part>.log; the others run all the same. Commit OUT/gpu-*.json to
# benchmarks/results: they hold the device, the versions and a hash of the kernel sources.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash benchmarks/gpu_suite.sh OUT [part ...]}
mkdir -p "$out"
out=$(cd "$out" && pwd)
shift
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(build probe tests kernels head gae peers peers_large tolerance memcheck racecheck)
python=${PYTHON:-python3}
device=${RLHF_KERNELS_SUITE_DEVICE:-cuda} # cpu: a dry run at tiny sizes
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PATH=$PATH:/usr/local/cuda/bin
# the tests that the CPU backends pass too, and the files that only a GPU can run
judged=(tests/test_token_stats.py tests/test_numerics.py tests/test_every_loss.py tests/test_fused_loss.py tests/test_tolerance.py)

part_build() { RLHF_KERNELS_EXT=1 "$python" setup.py -q build_ext --inplace && "$python" -c 'import rlhf_kernels as rk; print(rk.backends())'; }
part_probe() { "$python" benchmarks/gpu_probe.py --out "$out/gpu-probe.json" $([ "$device" = cpu ] && echo --device cpu); }
# the tests turn torch's deterministic mode on, which wants the variable; all failures of a run are worth their time
part_tests() {
  export CUBLAS_WORKSPACE_CONFIG=:4096:8
  if [ "$device" = cpu ]; then TRITON_INTERPRET=1 "$python" -m pytest -q -x tests/gpu/interpret/test_suite.py
  else "$python" -m pytest -q -W "ignore:Synchronization debug mode" tests/gpu/device; fi
}
part_kernels() {
  local many=()
  export CUBLAS_WORKSPACE_CONFIG=:4096:8
  # hundreds of kernels to compile: on several cores, where pytest-xdist is installed
  "$python" -c "import xdist" 2>/dev/null && many=(-n 8)
  if [ "$device" = cpu ]; then TRITON_INTERPRET=1 "$python" -m pytest -q -x "${judged[1]}" -k equal_logits
  else RLHF_KERNELS_TEST_GPU=1 "$python" -m pytest -q "${many[@]}" "${judged[@]}"; fi
}
part_head() { "$python" benchmarks/gpu_head.py --device "$device" --out "$out/gpu-head.json"; }
part_gae() { "$python" benchmarks/gpu_gae.py --device "$device" --out "$out/gpu-gae.json"; }
# whoever materialises logits has room for these; ops in the order in which they matter, should time end
beside_peers() {
  local shape=$1
  shift
  local ops=(--only sft --only train --only score --only sparse_kept --only grpo --only dpo_prompts --only kl)
  if [ "$device" = cpu ]; then shape=tiny; set -- --rounds 2 --skip compile "$@"; else set -- --tokens 8192 --seconds 4 "$@"; fi
  "$python" -W ignore -m benchmarks.side_by_side --shape "$shape" --dtype bf16 --device "$device" "${ops[@]}" "$@"
}
part_peers() {
  # on a CPU, peers whose kernels want a GPU are interpreted
  [ "$device" != cpu ] || "$python" -O -W ignore -m benchmarks.dry_run || return 1
  beside_peers qwen2.5-0.5b --only gae --out "$out/gpu-peers-qwen2.5-0.5b.json"
}
part_tolerance() {
  local shape=qwen3-8b tokens=8192 rounds=5
  [ "$device" = cpu ] && shape=tiny tokens=64 rounds=1
  "$python" -W ignore -m benchmarks.tolerance --shape $shape --tokens $tokens --dtype bf16 --device "$device" --kept \
    --rounds $rounds --out "$out/gpu-tolerance-$shape.json" \
    && "$python" -W ignore -m benchmarks.tolerance --shape $shape --tokens $tokens --dtype bf16 --device "$device" \
      --rounds $rounds --no-peers --nats inf --all-rows --out "$out/gpu-tolerance-uniform.json"
}
part_peers_large() { beside_peers qwen3-8b --out "$out/gpu-peers-qwen3-8b.json"; }
sanitized() {
  [ "$device" = cpu ] && { echo "the sanitizer needs a GPU"; return 0; }
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; return 1; }
  # compiles without the tool in its way; then memory straight from the driver, where torch's pools would hide overruns
  "$python" benchmarks/gpu_small.py \
    && PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 "$python" benchmarks/gpu_small.py
}
part_memcheck() { sanitized memcheck; }
part_racecheck() { sanitized racecheck; }

failed=()
for part in "${parts[@]}"; do
  if [ -e "$out/$part.done" ]; then
    echo "== $part: done before"
    continue
  fi
  echo "== $part"
  began=$SECONDS
  if timeout 590 bash -c "$(declare -p out python device judged); $(declare -f sanitized beside_peers "part_$part"); part_$part" >"$out/$part.log" 2>&1; then
    touch "$out/$part.done"
    tail -n 30 "$out/$part.log"
    echo "== $part: $((SECONDS - began)) s"
  else
    tail -n 30 "$out/$part.log"
    echo "== $part: FAILED after $((SECONDS - began)) s, see $out/$part.log"
    failed+=("$part")
  fi
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
