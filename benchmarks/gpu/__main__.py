"""Runs everything there is to run on a GPU, in stages that share the time.

    python -m benchmarks.gpu --seconds 560 --out DIR                 all stages
    python -m benchmarks.gpu --seconds 300 --out DIR --stages head,gae
    python -m benchmarks.gpu --out DIR2 --resume DIR/gpu.json        what is not complete there
    python -m benchmarks.gpu --seconds 200 --out DIR --dry           the same lines at tiny sizes, without a GPU
    python -m benchmarks.gpu prepare DIR                             what needs a network or time, beforehand
    python -m benchmarks.gpu --out DIR2 --carried DIR                with what was made beforehand

DIR/gpu.json has every result, the device, the versions and a hash of the kernel sources; DIR/gpu.log what happened. The
stages run in a process of their own: one that dies or hangs costs the stage it was in. The status is 0 if every stage
was done and nothing in it was wrong, 1 if not, 2 if nothing could be begun. What a signal ends leaves a whole file.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import PARTS, STAGES
from benchmarks.gpu.record import LOG, NAME, Record, is_bad, table

NAMES = tuple(STAGES)
PATIENCE = 12.0  # seconds for a process that was told to end, and for the programs that it has begun
HANGS = 15.0  # seconds past its deadline after which a stage whose process does not hear signals is killed


class Interrupted(BaseException):
    """Somebody has told this run to end; the argument is its exit status."""


def stages(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"there is no stage {name!r}; there are {', '.join(NAMES)}")
    return [name for name in NAMES if name in names]


def seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1 <= number <= 86400:
        raise argparse.ArgumentTypeError(f"got {text!r}, wants a number of seconds between 1 and 86400")
    return number


def existing(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return Path(text)


def folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    if not any(Path(text, part).is_dir() for part in PARTS):
        raise argparse.ArgumentTypeError(f"{text!r} has none of {', '.join(PARTS)}: it is not what prepare has made")
    return Path(text).resolve()


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    parser.add_argument("--seconds", type=seconds, default=560.0, help="for everything together (560)")
    parser.add_argument("--stages", type=stages, default=list(NAMES), help=f"some of {','.join(NAMES)}")
    parser.add_argument("--resume", type=existing, metavar="JSON", help="results of an earlier run to go on from")
    parser.add_argument("--carried", type=folder, metavar="DIR", help="what ``prepare`` has made")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on a CPU, by Triton's interpreter")
    parser.add_argument(
        "--until", type=float, help=argparse.SUPPRESS
    )  # It is for our own child, which runs the stages.
    args = parser.parse_args(argv)
    if args.until is None:
        if args.out.exists() and not args.out.is_dir():
            parser.error(f"--out: {args.out} is not a folder")
        if (args.out / NAME).exists():
            parser.error(f"--out: {args.out / NAME} is there already; name another folder, and --resume that file")
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / LOG).touch()
        except OSError as error:
            parser.error(f"--out: {args.out} cannot be written to ({error.strerror})")
    args.out = args.out.resolve()  # stages run programs elsewhere
    return args


def watched(process: subprocess.Popen[bytes], folder: Path, until: float) -> int:
    """Wait for the process; kill it if the stage that it is in is long over."""
    while True:
        try:
            return process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            ends = [stage["until"] for stage in Record(folder).stages.values() if stage["status"] == "running"]
            if time.time() > max(ends, default=until) + HANGS:
                os.killpg(process.pid, signal.SIGKILL)
                return process.wait()


def told_to_end(process: subprocess.Popen[bytes]) -> None:
    """It ends the programs that it has begun, which are no children of ours; then nothing of it is left."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def supervise(args: argparse.Namespace, given: Sequence[str]) -> int:
    """A process for the stages; after one that died, another for those that are left."""
    until = time.time() + args.seconds

    def end(number: int, _: Any) -> None:
        raise Interrupted(128 + number)

    before = {name: signal.signal(name, end) for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    environment = os.environ | {"TRITON_INTERPRET": str(int(args.dry))}
    command = [sys.executable, "-m", "benchmarks.gpu", *given, "--until", str(until)]
    interrupted = 0
    for _ in range(len(NAMES) + 1):
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            code = watched(process, args.out, until)
        except Interrupted as error:
            interrupted = code = int(error.args[0])
            told_to_end(process)
        record = Record(args.out)
        if code == 2:
            return 2
        running = [name for name, stage in record.stages.items() if stage["status"] == "running"]
        for name in running:
            record.end(name, "failed", f"its process ended with status {code}")
        if interrupted or code == 0 or "about" not in record.content or not set(args.stages) - set(record.stages):
            break
    for name, handler in before.items():
        signal.signal(name, handler)
    return interrupted or conclude(Record(args.out), args.stages)


def conclude(record: Record, names: Sequence[str]) -> int:
    """Print the table, into the log too, and judge the run."""
    lines = table(record.content)
    print("\n".join(lines))
    with open(record.folder / LOG, "a") as log:
        log.write("\n".join([*lines, ""]))
    fine = all(record.stages.get(name, {}).get("status") == "done" for name in names)
    return int(not fine or any(is_bad(row) for stage in record.stages.values() for row in stage["rows"]))


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["prepare"]:
        from benchmarks.gpu.ahead.prepare import main as prepare

        return prepare(given[1:]) or 0
    args = arguments(given)
    if args.until is None:
        return supervise(args, given)
    from benchmarks.gpu import runner

    return runner.work(args.out, args.stages, args.until, args.dry, args.resume, args.carried)


if __name__ == "__main__":
    sys.exit(main())
