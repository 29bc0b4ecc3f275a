"""Makes beforehand what a run on a GPU would lose its minutes with, or could not fetch without a network.

    python -m benchmarks.gpu prepare DIR                            kernels for sm_90, the extension, wheels of peers
    python -m benchmarks.gpu prepare DIR --chips sm_90,sm_100
    python -m benchmarks.gpu prepare DIR --only wheels --only ext

DIR/triton has kernels, compiled for chips that need not be here. DIR/ext has rlhf_kernels._cuda for the Python of the
other machine. DIR/wheels has peers. What cannot be made is said, and the rest is made; carried.py uses it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders.loading import FOLDERS
from benchmarks.gpu import PARTS
from benchmarks.gpu.ahead import carried
from benchmarks.gpu.ahead.compiled import CHIPS
from benchmarks.report.kernel_hash import ROOT

PEERS = ("liger-kernel-nightly==0.8.5.dev20261027042432", "trl==1.16.0", "verl==0.9.1")
STAGES = ("gae", "head", "correctness", "peers")  # what launches most of the kernels, the most valuable first


class Unable(Exception):
    """A part that cannot be made here; the message says why."""


def called(command: Sequence[str | Path], **environment: str) -> None:
    """Run a command in the checkout, seen as it goes.

    Raises:
        Unable: It failed.
    """
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=os.environ | environment)
    if done.returncode:
        raise Unable(f"{' '.join(map(str, command[:6]))} ended with status {done.returncode}")


def python(version: str) -> Path:
    """An interpreter of this version that runs and has its headers.

    Raises:
        Unable: There is none.
    """
    ask = "import sys, sysconfig; print(sys.version.split()[0], sysconfig.get_path('include'))"
    homes = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    wanted = [shutil.which(f"python{version}"), sys.executable, *sorted(homes.glob(f"{version}*/bin/python"))]
    for path in filter(None, wanted):
        done = subprocess.run([str(path), "-c", ask], capture_output=True, text=True)
        found, _, headers = done.stdout.strip().partition(" ")
        if done.returncode == 0 and f"{found}.".startswith(f"{version}.") and Path(headers, "Python.h").exists():
            return Path(path)
    raise Unable(f"there is no Python {version} with its headers here")


def wheels(folder: Path, args: argparse.Namespace) -> None:
    called([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder, *PEERS])


def ext(folder: Path, args: argparse.Namespace) -> None:
    """setup.py builds it, in an environment of the other Python."""
    with tempfile.TemporaryDirectory() as work:
        called([python(args.python), "-m", "venv", f"{work}/venv"])
        own = Path(work, "venv", "bin", "python")
        called([own, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", "setuptools", "pybind11", "ninja"])
        build = ["build_ext", "--build-lib", f"{work}/lib", "--build-temp", f"{work}/temp"]
        called([own, "setup.py", "-q", *build], RLHF_KERNELS_EXT="0", RLHF_KERNELS_CUDA="1")
        (made,) = Path(work, "lib").rglob("_cuda*.so")
        shutil.copy(made, folder / made.name)


def triton(folder: Path, args: argparse.Namespace) -> None:
    """In a process whose Triton does not interpret, with the peers that were downloaded."""
    with tempfile.TemporaryDirectory() as work:
        if (args.folder / "wheels").is_dir():
            carried.wheels(args.folder / "wheels", Path(work))
        environment = {FOLDERS: os.environ.get(FOLDERS, ""), "TRITON_INTERPRET": "0"}
        for chip in args.chips:
            stages = ",".join(args.stages)
            called([sys.executable, "-O", "-m", "benchmarks.gpu.ahead.compiled", folder, chip, stages], **environment)
    about: dict[str, Any] = {"key": carried.triton_key(), "chips": args.chips, "stages": args.stages}
    about["kernels"] = sum(1 for _ in folder.glob("*/*.cubin"))
    (folder / carried.ABOUT).write_text(json.dumps(about) + "\n")


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def several(names: Sequence[str]) -> Any:
    def parsed(text: str) -> list[str]:
        for name in text.split(","):
            if name not in names:
                raise argparse.ArgumentTypeError(f"there is no {name!r}; there are {', '.join(names)}")
        return text.split(",")

    return parsed


def main(argv: Sequence[str]) -> int:
    own: dict[str, Any] = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu prepare", **own)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--python", default="3.12", help="version of the other machine's Python (3.12)")
    parser.add_argument("--chips", type=several(list(CHIPS)), default=["sm_90"], help="as in sm_90,sm_100 (sm_90)")
    parser.add_argument("--stages", type=several(STAGES), default=list(STAGES), help="whose kernels are compiled (all)")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be repeated")
    args = parser.parse_args(argv)
    args.folder = args.folder.resolve()
    failed = False
    for name, make in (("wheels", wheels), ("ext", ext), ("triton", triton)):
        if args.only and name not in args.only:
            continue
        folder = args.folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"DIR: {folder} cannot be made ({error.strerror})")
        try:
            make(folder, args)
        except Unable as error:
            failed = True
            print(f"{name}: {error}", flush=True)
    for name in PARTS:
        if (args.folder / name).is_dir():
            print(f"{name}: {size_of(args.folder / name) / 1e6:.1f} MB")
    print(f"all: {size_of(args.folder) / 1e6:.1f} MB in {args.folder}")
    return int(failed)
