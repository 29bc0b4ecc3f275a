"""`rlhf-train`: one subcommand per stage; the flags of a stage are the fields of its config.

Nothing heavy is imported at the top. The thread policy has to stand in the environment before torch loads OpenMP, and
`--help` should not wait for torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.base import config as config_file
from trainer.base import console, permission, ranks
from trainer.base.address import redacted
from trainer.base.config import version
from trainer.base.console import Parser, say
from trainer.base.subcommands import SPREAD, STAGES, TOOLS, Stage
from trainer.base.threads import TINY, model_of, one_bar_only, set_threads, used_threads
from trainer.base.typed_options import home
from trainer.cli.help import whole
from trainer.cli.run_stage import OUT, PROG, parse, resumable, run_stage, say_how_to_go_on
from trainer.data import hashing
from trainer.report import page as report
from trainer.rewards.names import check_sources
from trainer.run import folder as run_folder
from trainer.run import rank_folder, sinks
from trainer.training.defaults import decided

FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: Arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1 for a run that went wrong in a known way, 2 for a mistake in options or data (one line,
        no traceback), 130 after Ctrl-C. SIGTERM ends the process with 143.

    Raises:
        Exception: Anything that is not the user's mistake keeps its traceback.
    """
    if argv is None:
        sys.excepthook, warnings.formatwarning = console.unforeseen, console.warned
    argv = [home(word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        with permission.only(permission.named(argv)):
            return _main(argv)
    except KeyboardInterrupt:
        say(f"\n{PROG}: interrupted", error=True)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in {"trainer", "rlhf_kernels", ""} or "--traceback" in argv:
            raise
        say(f'{PROG}: {package} is missing: pip install "rlhf_kernels[train]"', error=True)
        return USAGE_ERROR
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error) or "--traceback" in argv:
            raise
        why = str(error).partition("\n")[0] or type(error).__name__
        say(f"{PROG}: out of memory: {why}", error=True)
        say("Begin again with a smaller --max-tokens, or a smaller --sample-batch where it samples.", error=True)
        return FAILED
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if not _is_ours(error) or "--traceback" in argv:
            raise
        say(f"{PROG}: {redacted(str(error))}", error=True)
        return FAILED if isinstance(error, FloatingPointError) else USAGE_ERROR


def _is_out_of_memory(error: BaseException) -> bool:
    """Of the machine or of a GPU; for a CPU's torch has no class of its own."""
    told = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in told or "can't allocate memory" in told


def _is_ours(error: BaseException) -> bool:
    """Raised by our own checks, which explain themselves; an error from deep inside a library needs its traceback.

    What the system says about a file (no such folder, read-only, no space left) is of the first kind.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    roots = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "rlhf_kernels")]
    return bool(frames) and any(frames[-1].filename.startswith(root + os.sep) for root in roots)


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        say(whole(PROG, {k: v.about for k, v in STAGES.items()}, {k: about for k, (_, about) in TOOLS.items()}))
        return 0 if argv else USAGE_ERROR
    if argv[0] == "--version":
        say(version())
        return 0
    name, *rest = argv
    if ranks.count() > 1 and name not in SPREAD:
        raise ValueError(f"{name}: got {ranks.count()} processes, wants one; torchrun is for {', '.join(SPREAD)}")
    if name in ("report", "resume"):
        return {"report": _report, "resume": _resume}[name](rest)
    if name == "pipeline":
        from trainer.cli import pipeline

        return pipeline.main(rest)
    if name in TOOLS:
        return _tool(name, rest)
    config_file.check_names([name], [*STAGES, *TOOLS, "report", "resume", "pipeline"], "", "command")
    return _run(name, rest)


def _tool(name: str, argv: list[str]) -> int:
    """A subcommand that looks at something and prints; it has no run folder."""
    if name == "inspect":
        set_threads(None, default=1)  # the doctor is to see what the caller's environment says
    return importlib.import_module(TOOLS[name][0]).main(argv, prog=f"{PROG} {name}")


def _run(name: str, argv: list[str]) -> int:
    """Options, then threads, then torch (with the stage's module), then the run."""
    common, flags = _common_options(argv)
    recipe = config_file.load(common.config) if common.config else {}
    of = recipe.pop("stage", name)
    if of != name:
        raise ValueError(f"--config: {common.config} is a recipe for {of}, not for {name}")
    threads = recipe.pop("threads", None) if common.threads is None else common.threads
    stage, module = _load(name, threads, flags, recipe)
    config = parse(name, getattr(module, stage.config), recipe, flags, common.config)
    sinks.check(getattr(config, "log_to", ()))
    config = rank_folder.placed(config)
    out = Path(getattr(config, OUT))
    provenance = _provenance(name, argv, config)
    check_sources(config)
    folders = (name, getattr(module, "FOLDERS", ()))
    run_folder.claim(out, overwrite=common.overwrite, reads=[config], own=folders)
    config_file.write_resolved(out, decided(config), provenance, {"stage": name, "threads": used_threads()})
    return _train_alone(name, getattr(module, stage.run), config)


def _resume(argv: list[str]) -> int:
    """The run of a folder, as `resolved.yaml` in it says, from its last checkpoint."""
    parser = Parser(
        prog=f"{PROG} resume", description="Go on with a run that was stopped, from its last checkpoint.",
        epilog="Options of the stage may follow; those that would change the result are refused.",
    )  # fmt: skip
    parser.add_argument("run", type=Path)
    permission.add_option(parser)
    out, flags = (found := parser.parse_known_args(argv))[0].run.absolute(), found[1]
    if not (out / config_file.RESOLVED).is_file():
        raise ValueError(f"resume: {out} holds no run: there is no {config_file.RESOLVED} in it")
    from trainer.cli import pipeline

    run_folder.refuse_links(out, folders=())
    if pipeline.planned(out):
        return pipeline.main([str(out / config_file.RESOLVED), "--out", str(out), *flags])
    recipe = config_file.load(out / config_file.RESOLVED)
    name = recipe.pop("stage", None)
    if name not in STAGES:
        raise ValueError(f"resume: {out / config_file.RESOLVED} does not name its stage, want stage: sft or the like")
    if (out / run_folder.SUMMARY).exists():
        say(f"{out} holds a finished run: nothing to resume")
        return 0
    run_folder.refuse_links(out)
    stage, module = _load(name, recipe.pop("threads", None), flags, recipe)
    if not resumable(run := getattr(module, stage.run)):
        raise ValueError(f"resume: a run of {name} cannot be resumed; start it again with --overwrite")
    recipe[OUT] = str(out)
    config = parse(name, getattr(module, stage.config), recipe, flags, str(out / config_file.RESOLVED))
    check_sources(config)
    return _train_alone(name, run, rank_folder.placed(config, resume=True), resume=True)


def _load(name: str, threads: int | None, flags: list[str], recipe: dict[str, Any]) -> tuple[Stage, Any]:
    """A stage and its module, imported after the threads are set."""
    recipe.pop("threads", None)
    set_threads(threads, default=1 if name == "demo" or model_of(flags, recipe) == TINY else None)
    module = importlib.import_module(STAGES[name].module)
    one_bar_only()
    return STAGES[name], module


def _train_alone(name: str, run: Any, config: Any, **options: Any) -> int:
    """A run, and how to go on with it where it stops."""
    out = Path(getattr(config, OUT))
    try:
        run_stage(name, run, config, **options)
    except BaseException:
        if run_folder.has_checkpoints(out):
            say_how_to_go_on(out, [config])
        raise
    return 0


def _common_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(prog=PROG, add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--threads", type=int)
    permission.add_option(parser)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--traceback", action="store_true")
    return parser.parse_known_args(argv)


def _provenance(name: str, argv: list[str], config: Any) -> list[str]:
    """What a reader needs to run this again: the command, the versions, and a fingerprint of every data file.

    Raises:
        FileNotFoundError: A data file does not exist; better now than after an earlier run was cleared away.
    """
    lines = [f"{PROG} {name} {shlex.join(argv)}".rstrip(), f"{version()}, python {platform.python_version()}"]
    for option, value in config_file.plain(config).items():
        if (option == "data" or option.endswith("_data")) and value is not None:
            lines.append(f"{option}: sha256 {hashing.sha256(value)}")
    return lines


def _report(argv: list[str]) -> int:
    parser = Parser(prog=f"{PROG} report", description="Write report.html again from a run folder.")
    parser.add_argument("run", type=Path)
    say(str(report.write(parser.parse_args(argv).run)))
    return 0
