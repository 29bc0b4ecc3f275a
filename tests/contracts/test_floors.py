"""The house keeps its own rules: floors, sizes, names, and a front door that opens quickly."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_kernels as rk
from rlhf_kernels import reference

ROOT = Path(__file__).parents[2]
FULL = 300

# the contract: name, positional arguments, keywords with their defaults
DENOMINATORS = "reduction='token_mean', num_tokens=None, num_sequences=None, cu_seqlens=None"
POLICY = (
    "clip=(0.2, 0.2), dual_clip=None, clip_rule='ppo', ratio='token', entropy_coef=0.0, ref_logp=None, ref=None, "
    "kl_coef=0.0, kl='k3', token_weight=None, " + DENOMINATORS
)
CONTRACT = {
    "token_stats": ("hidden, weight, targets", ""),
    "token_stats_from_logits": ("logits, targets", ""),
    "token_logps": ("hidden, weight, token_ids", ""),
    "kl_divergence": ("hidden, weight, ref_hidden, ref_weight, targets", "direction='reverse', ref_head=None"),
    "fused_loss": ("hidden, weight, targets, objective", "per_token=(), per_sequence=(), cu_seqlens=None, unit=1"),
    "ppo_loss": ("hidden, weight, targets, old_logp, advantages", POLICY),
    "grpo_loss": ("hidden, weight, targets, old_logp, advantages", POLICY),
    "dpo_loss": (
        "hidden, weight, targets, cu_seqlens, ref_logp",
        "beta=0.1, loss='sigmoid', label_smoothing=0.0, length_normalize=False, margin=None, "
        "sft_coef=0.0, num_pairs=None",
    ),
    "ipo_loss": ("hidden, weight, targets, cu_seqlens, ref_logp", "beta=0.1, length_normalize=True, num_pairs=None"),
    "kto_loss": (
        "hidden, weight, targets, cu_seqlens, ref_logp, desirable, kl",
        "beta=0.1, desirable_weight=1.0, undesirable_weight=1.0, num_sequences=None",
    ),
    "orpo_loss": ("hidden, weight, targets, cu_seqlens", "beta=0.1, num_pairs=None, num_tokens=None"),
    "simpo_loss": (
        "hidden, weight, targets, cu_seqlens",
        "beta=2.0, margin=1.0, label_smoothing=0.0, sft_coef=0.0, num_pairs=None",
    ),
    "sft_loss": ("hidden, weight, targets", "label_smoothing=0.0, z_loss=0.0, token_weight=None, " + DENOMINATORS),
    "value_loss": ("values, returns", "old_values=None, clip=None, mask=None, " + DENOMINATORS),
    "bradley_terry_loss": (
        "scores", "ranks=None, groups=2, margin=None, center_coef=0.0, label_smoothing=0.0, num_groups=None",
    ),
    "plackett_luce_loss": ("scores, ranks, groups", "top=None, num_groups=None"),
    "infonce_loss": ("scores, positive, groups", "temperature=1.0, num_groups=None"),
    "gae": ("rewards, values, cu_seqlens", "gamma=1.0, lam=0.95, mask=None, bootstrap=None, whiten=False"),
    "shaped_rewards": ("scores, logp, ref_logp, cu_seqlens", "beta=<required>, mask=None, kl='k1', kl_clip=None"),
    "group_advantages": ("scores, groups", "baseline='mean', scale='group_std', eps=1e-06"),
    "whiten": ("x, mask", "shift_mean=True, eps=1e-08, process_group=None"),
    "backends": ("", ""),
    "warmup": ("hidden_size, vocab_size, dtype", ""),
}  # fmt: skip
NOUNS = {"TokenStats", "LossOutput", "HeadOptions"}
HEAD_OPTIONS = {
    "bias", "temperature", "softcap", "logit_scale", "vocab_size", "ignore_index", "backend", "max_bytes",
    "weight_grad", "loss_scale", "checks",
}  # fmt: skip


@pytest.mark.parametrize("name", list(CONTRACT))
def test_signatures_are_the_contract(name):
    """Names, order and defaults; keywords may be added."""
    positional, keywords = CONTRACT[name]
    parameters = inspect.signature(getattr(rk, name)).parameters.values()
    got = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert ", ".join(got) == positional
    offered = {
        p.name: "<required>" if p.default is p.empty else repr(p.default)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    }
    wanted = dict(part.split("=", 1) for part in keywords.replace("0.2, 0.2", "0.2,0.2").split(", ") if part)
    missing = {k: v for k, v in wanted.items() if offered.get(k, "").replace("0.2, 0.2", "0.2,0.2") != v}
    assert not missing, f"{missing}, offered are {offered}"
    assert [k for k in offered if k in wanted] == list(wanted)


def test_public_names_are_the_documented_ones():
    assert set(rk.__all__) - NOUNS == set(CONTRACT)
    assert set(rk.__all__) >= NOUNS
    assert list(rk.__all__) == sorted(rk.__all__)
    assert set(rk.HeadOptions.__annotations__) >= HEAD_OPTIONS


@pytest.mark.parametrize("name", list(CONTRACT))
def test_every_public_function_is_documented_by_example(name):
    doc = inspect.getdoc(getattr(rk, name)) or ""
    assert ">>>" in doc, f"{name} has no doctest"


def test_every_public_function_has_an_oracle():
    """But for a user's own objective, ready logits (a head that is the identity), and what computes nothing."""
    judged = set(CONTRACT) - {"fused_loss", "token_stats_from_logits", "backends", "warmup"}
    assert {name for name in judged if not callable(getattr(reference, name, None))} == set()


def test_no_file_is_too_long():
    files = [
        f for folder in ("rlhf_kernels", "trainer", "csrc", "tests", "benchmarks", "examples")
        for f in (ROOT / folder).rglob("*")
        if f.suffix in {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh"}
    ]  # fmt: skip
    assert len(files) > 30
    long = {str(f.relative_to(ROOT)): n for f in files if (n := len(f.read_text().splitlines())) > FULL}
    assert not long


def test_the_oracle_shares_no_code_with_the_accused():
    for file in (ROOT / "rlhf_kernels" / "reference").glob("*.py"):
        for line in file.read_text().splitlines():
            if line.startswith(("import ", "from ")) and "rlhf_kernels" in line:
                assert line.startswith("from rlhf_kernels.reference"), f"{file.name}: {line}"


def test_floors():
    lint = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    if lint is None:
        pytest.skip("import-linter is not installed")
    done = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_importing_is_quick_and_brings_nothing_heavy():
    program = (
        "import sys, time, torch; before = set(sys.modules); start = time.process_time(); import rlhf_kernels;"
        "print(time.process_time() - start, *sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    seconds = []  # of the processor: a busy machine takes nothing away from it
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        taken, *modules = done.stdout.split()
        seconds.append(float(taken))
        heavy = {"triton", "transformers", "trainer", "numpy", "flash_attn", "tyro", "rich"} & set(modules)
        assert not heavy
    assert min(seconds) < 0.3


def test_no_kernel_has_an_atomic_or_a_lock():
    """With either, two runs would add in two orders. Comments may say that there is none."""
    folders = ROOT / "csrc", ROOT / "rlhf_kernels" / "backends", ROOT / "rlhf_kernels" / "engine"
    files = [f for folder in folders for f in folder.rglob("*") if f.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}]
    assert len(files) > 40
    word = re.compile(r"atomic|mutex|lock_guard|unique_lock|omp critical|\bR?Lock\(", re.I)
    for file in files:
        comment = r'#.*|"""(?s:.*?)"""' if file.suffix == ".py" else "//.*"
        assert not word.search(re.sub(comment, "", file.read_text())), file.relative_to(ROOT)
