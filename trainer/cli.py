"""`rlhf-train`: one subcommand per stage; the flags of a stage are the fields of its config.

Nothing heavy is imported at the top. The thread policy has to stand in the environment before torch loads OpenMP, and
`--help` should not wait for torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import platform
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from trainer import config_file, data_file, log, report

PROG = "rlhf-train"
USAGE_ERROR, INTERRUPTED = 2, 130
OUT, MODEL = "out", "model"  # the fields of a stage's config that name the run folder and the model
TINY = "tiny"  # the default model; more threads than one slow it down


class Stage(NamedTuple):
    """Where a subcommand lives; imported only when it is asked for."""

    module: str
    config: str
    run: str
    about: str


STAGES = {
    "demo": Stage("trainer.demo", "DemoConfig", "run", "SFT, reward model and PPO from scratch, on a laptop CPU"),
    "sft": Stage("trainer.sft", "SFTConfig", "train", "supervised fine-tuning on demonstrations"),
    "reward": Stage("trainer.reward", "RewardConfig", "train", "reward model on preference pairs or K-wise rankings"),
    "ppo": Stage("trainer.ppo", "PPOConfig", "train", "PPO with value model and KL control, on prompts"),
}
COMMON = """\
every stage also takes:
  --config FILE.yaml   read options from a recipe; flags on the command line win
  --threads N          CPU threads (default: OMP_NUM_THREADS, else 1 for the demo and tiny models)
  --overwrite          replace a finished run in the same folder
  --traceback          show where an error came from"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: Arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0, 2 for a mistake in options or data (one line, no traceback), 130 after Ctrl-C.

    Raises:
        Exception: Anything that is not the user's mistake keeps its traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(argv)
    except KeyboardInterrupt:
        print(f"\n{PROG}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in {"trainer", "rlhf_kernels", ""} or "--traceback" in argv:
            raise
        print(f'{PROG}: {package} is missing: pip install "rlhf_kernels[train]"', file=sys.stderr)
        return USAGE_ERROR
    except (ValueError, TypeError, OSError) as error:
        if not _is_ours(error) or "--traceback" in argv:
            raise
        print(f"{PROG}: {error}", file=sys.stderr)
        return USAGE_ERROR


def _is_ours(error: BaseException) -> bool:
    """Raised by our own checks, which explain themselves; an error from deep inside a library needs its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    roots = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "rlhf_kernels")]
    return bool(frames) and any(frames[-1].filename.startswith(root + os.sep) for root in roots)


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else USAGE_ERROR
    if argv[0] == "--version":
        print(_version())
        return 0
    name, *rest = argv
    if name == "report":
        return _report(rest)
    config_file.check_names([name], [*STAGES, "report"], PROG)
    return _run(name, rest)


def _run(name: str, argv: list[str]) -> int:
    """Options, then threads, then torch (with the stage's module), then the run."""
    common, flags = _common_options(argv)
    recipe = config_file.load(common.config) if common.config else {}
    wanted = common.threads if common.threads is not None else recipe.pop("threads", None)
    recipe.pop("threads", None)
    _set_threads(wanted, default=1 if name == "demo" or _model(flags, recipe) == TINY else None)

    stage = STAGES[name]
    module = importlib.import_module(stage.module)
    _one_bar_only()
    config = _parse(name, getattr(module, stage.config), recipe, flags, common.config)
    out = Path(getattr(config, OUT))
    provenance = _provenance(name, argv, config)
    log.claim(out, overwrite=common.overwrite)
    config_file.write_resolved(out, config, provenance)
    began = time.monotonic()
    getattr(module, stage.run)(config)
    if not (out / log.SUMMARY).exists():
        log.RunLog(out, quiet=True).summary({"stage": name, "seconds": round(time.monotonic() - began, 1)})
    print(f"report: {report.write(out)}")
    return 0


def _common_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog=PROG, add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--traceback", action="store_true")
    return parser.parse_known_args(argv)


def _model(flags: list[str], recipe: dict[str, Any]) -> str:
    """The model as far as it can be known before torch, and with it the stage's config, is imported."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(f"--{MODEL}", default=recipe.get(MODEL, TINY))
    try:
        return parser.parse_known_args(flags)[0].model
    except argparse.ArgumentError:
        return TINY


def _set_threads(wanted: int | None, default: int | None) -> None:
    """Threads and spinning of OpenMP, which reads the environment once, when torch is imported.

    libgomp's threads spin while they wait; beside a busy neighbour that turns microseconds into milliseconds, so the
    spin is cut short whatever the number of threads.

    Args:
        wanted: From the command line or the recipe; wins over OMP_NUM_THREADS.
        default: Where neither says anything; None leaves the choice to torch.

    Raises:
        ValueError: `wanted` is not a positive integer.
    """
    if wanted is not None and (not isinstance(wanted, int) or wanted < 1):
        raise ValueError(f"threads: got {wanted!r}, want a positive integer")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if wanted is not None:
        os.environ["OMP_NUM_THREADS"] = str(wanted)
    elif default is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(default))
    # A caller that imported torch before us (a notebook, a test) has its OpenMP already; only the number can change.
    if "torch" in sys.modules and wanted is not None:
        sys.modules["torch"].set_num_threads(wanted)


def _one_bar_only() -> None:
    """Switches off transformers' bars for loading and saving, which would drown ours; downloads keep theirs."""
    if "transformers" in sys.modules:
        importlib.import_module("transformers.utils.logging").disable_progress_bar()
        importlib.import_module("huggingface_hub.utils").enable_progress_bars()


def _parse(name: str, config_class: type, recipe: dict, flags: list[str], source: str | None) -> Any:
    import tyro

    about = f"{STAGES[name].about}\n\n{COMMON}"
    config_file.check_names(recipe, [f.name for f in dataclasses.fields(config_class)], f"--config {source}")
    argv = config_file.as_flags(recipe, flags) + flags
    return tyro.cli(config_class, args=argv, prog=f"{PROG} {name}", description=about)


def _provenance(name: str, argv: list[str], config: Any) -> list[str]:
    """What a reader needs to run this again: the command, the versions, and a fingerprint of every data file.

    Raises:
        FileNotFoundError: A data file does not exist; better now than after an earlier run was cleared away.
    """
    lines = [f"{PROG} {name} {shlex.join(argv)}".rstrip(), f"{_version()}, python {platform.python_version()}"]
    for option, value in config_file.plain(config).items():
        if (option == "data" or option.endswith("_data")) and value is not None:
            lines.append(f"{option}: sha256 {data_file.sha256(value)}")
    return lines


def _report(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"{PROG} report", description="Write report.html again from a run folder.")
    parser.add_argument("run", type=Path)
    print(report.write(parser.parse_args(argv).run))
    return 0


def _version() -> str:
    names = ("rlhf_kernels", "torch", "transformers")
    return ", ".join(f"{name} {_version_of(name)}" for name in names)


def _version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _help() -> str:
    stages = "\n".join(f"  {name:<8} {stage.about}" for name, stage in STAGES.items())
    return f"""usage: {PROG} STAGE [options]      ({PROG} STAGE --help lists the options of a stage)

stages:
{stages}
  report   write report.html again from a run folder

{COMMON}

start here:
  {PROG} demo
  {PROG} sft --model MODEL --data demonstrations.jsonl --out runs/sft"""
