"""Packs the peers for a GPU machine that has torch and Triton but no network, in parts of at most 64 MiB.

    python -m benchmarks.pack_peers OUT                     # here: OUT/part-1, OUT/part-2, ... with wheels in them
    python -m benchmarks.pack_peers OUT --only quack        # one peer and what it needs
    python benchmarks/pack_peers.py --unpack OUT PEERS      # there, all parts or some; then RLHF_KERNELS_PEERS=PEERS

A wheel larger than a part is cut into slices, which --unpack puts together; nothing is installed. Wheels are asked of
pip, for the Python and platform given. rl-triton has no wheel: give a checkout's src folder in RLHF_KERNELS_PEERS too.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

MIB = 2**20
PART = 64 * MIB - 64 * 1024  # what names and folders take
# by peer: what it needs beyond torch, triton and numpy; each without its own requirements
CUTLASS = (
    "nvidia-cutlass-dsl==4.7.1", "nvidia-cutlass-dsl-libs-core==4.7.1", "nvidia-cutlass-dsl-libs-base==4.7.1",
    "nvidia-cutlass-dsl-libs-cu13==4.7.1", "apache-tvm-ffi<0.2,>=0.1.6", "cuda-bindings", "cuda-pathfinder", "protobuf",
)  # fmt: skip
WHEELS: dict[str, tuple[str, ...]] = {
    "liger": ("liger-kernel==0.8.5", *CUTLASS),  # its Hopper kernels
    "trl": (
        "trl==1.16.0", "transformers>=5.17,<6", "huggingface-hub", "tokenizers", "safetensors", "regex", "tqdm",
        "pyyaml", "packaging", "filelock", "requests", "httpx", "httpcore", "h11", "anyio", "certifi", "idna",
        "typer", "click", "shellingham", "fsspec", "hf-xet",
    ),
    "verl": ("verl==0.9.1", "packaging"),
    "cce": ("cut-cross-entropy==25.1.1",),
    "fla": ("fla-core==0.6.0", "einops"),
    "quack": ("quack-kernels==0.6.5", *CUTLASS, "torch-c-dlpack-ext", "einops"),
}  # fmt: skip


def slices(path: Path, most: int) -> Iterator[tuple[str, int, int]]:
    """(name, start, bytes) of the pieces of a file; one piece keeps the file's name."""
    size = path.stat().st_size
    count = max(-(-size // most), 1)
    for k in range(count):
        name = path.name if count == 1 else f"{path.name}.slice{k + 1}of{count}"
        yield name, k * most, min(most, size - k * most)


def parts(files: Sequence[Path], most: int) -> list[list[tuple[Path, str, int, int]]]:
    """Pieces of the files, the largest first, each into the first part that has room."""
    pieces = [(path, *piece) for path in files for piece in slices(path, most)]
    packed: list[tuple[int, list[tuple[Path, str, int, int]]]] = []
    for piece in sorted(pieces, key=lambda p: (-p[3], p[1])):
        for k, (used, inside) in enumerate(packed):
            if used + piece[3] <= most:
                packed[k] = used + piece[3], [*inside, piece]
                break
        else:
            packed.append((piece[3], [piece]))
    return [inside for _, inside in packed]


def pack(files: Sequence[Path], out: Path, most: int = PART) -> list[Path]:
    """Write the parts as folders.

    Raises:
        ValueError: ``out`` holds something already.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"OUT: {out} is not empty")
    folders = []
    for number, inside in enumerate(parts(files, most), 1):
        folder = out / f"part-{number}"
        folder.mkdir(parents=True)
        for path, name, start, size in inside:
            with path.open("rb") as whole:
                whole.seek(start)
                (folder / name).write_bytes(whole.read(size))
        folders.append(folder)
    return folders


def unpack(packed: Path, into: Path) -> list[str]:
    """Put slices together and every wheel's contents into one folder; names of the wheels.

    Raises:
        ValueError: a slice is missing.
    """
    into.mkdir(parents=True, exist_ok=True)
    found = {path.name: path for path in packed.rglob("*") if path.is_file()}
    wheels: dict[str, list[Path]] = {}
    for name, path in sorted(found.items()):
        cut = re.fullmatch(r"(.*\.whl)\.slice(\d+)of(\d+)", name)
        if cut is None:
            if name.endswith(".whl"):
                wheels[name] = [path]
            continue
        wanted = [f"{cut[1]}.slice{k + 1}of{cut[3]}" for k in range(int(cut[3]))]
        missing = [piece for piece in wanted if piece not in found]
        if missing:
            raise ValueError(f"{cut[1]}: {', '.join(missing)} not there; want every part that has slices of it")
        wheels[cut[1]] = [found[piece] for piece in wanted]
    for pieces in wheels.values():
        with tempfile.TemporaryFile() as whole:
            for piece in pieces:
                with piece.open("rb") as one:
                    shutil.copyfileobj(one, whole)
            with zipfile.ZipFile(whole) as wheel:
                wheel.extractall(into)
    return sorted(wheels)


def download(names: Sequence[str], into: Path, python: str) -> list[Path]:
    """The wheels of these requirements and of nothing else."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python, "--dest", str(into)]
    for low in (17, 24, 28, 34, 35):
        command += ["--platform", f"manylinux_2_{low}_x86_64"]
    command += ["--platform", "manylinux2014_x86_64", *dict.fromkeys(names)]
    subprocess.run(command, check=True)
    return sorted(into.glob("*.whl"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("peers", type=Path, nargs="?", metavar="PEERS")
    parser.add_argument("--unpack", action="store_true", help="OUT's wheels into PEERS")
    parser.add_argument("--only", action="append", choices=WHEELS, help="this peer; may be repeated")
    parser.add_argument("--python", default="3.12", help="version of the GPU machine's Python")
    given = parser.parse_args(argv)
    if given.unpack:
        if given.peers is None:
            parser.error("--unpack wants OUT and PEERS")
        print("\n".join(unpack(given.out, given.peers)))
        return
    names = [name for peer in given.only or WHEELS for name in WHEELS[peer]]
    with tempfile.TemporaryDirectory() as folder:
        for part in pack(download(names, Path(folder), given.python), given.out):
            inside = sorted(part.iterdir())
            size = sum(path.stat().st_size for path in inside)
            print(f"{part}: {size / MIB:.1f} MiB, {', '.join(path.name for path in inside)}")


if __name__ == "__main__":
    main()
