"""One stage as the command line runs it: its options, the run itself, and how to go on with it."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.base import config as config_file
from trainer.base import permission
from trainer.base.address import redacted
from trainer.base.console import say, visible
from trainer.base.subcommands import STAGES
from trainer.cli import foreign_options
from trainer.cli.help import COMMON
from trainer.report import page as report
from trainer.rewards.names import sources_of
from trainer.run import folder as run_folder
from trainer.run import log

PROG = "rlhf-train"
OUT = "out"  # the field of a stage's config that names the run folder


def say_how_to_go_on(out: Path, configs: Sequence[Any]) -> None:
    """The command, with what it takes to allow the same code again."""
    names = [name for config in configs for _, name in sources_of(config)]
    allowed = [f" {permission.FLAG} {module}" for module in sorted(permission.modules(names))]
    say(f"{PROG}: go on with: {PROG} resume {shlex.quote(str(out))}{''.join(allowed)}", error=True)


def run_stage(name: str, run: Any, config: Any, **options: Any) -> None:
    """The run itself, a summary where it leaves none, and the report."""
    began, out = time.monotonic(), Path(getattr(config, OUT))
    run(config, **options)
    if not (out / run_folder.SUMMARY).exists():
        log.RunLog(out, quiet=True).summary({"stage": name, "seconds": round(time.monotonic() - began, 1)})
    say(f"report: {report.write(out)}")


def resumable(run: Any) -> bool:
    """Whether a stage can go on from a checkpoint."""
    return "resume" in inspect.signature(run).parameters


def parse(
    name: str, config_class: type, recipe: dict, flags: list[str], source: str | None, *, about: str | None = None
) -> Any:
    """A stage's config out of a recipe and flags, which win; tyro says what is wrong with a value, and exits."""
    import tyro

    about = f"{about or STAGES[name].about}\n\n{COMMON}"
    known = [f.name for f in dataclasses.fields(config_class)]
    foreign_options.refuse(recipe, known, f"--config {source}")
    known += [f"no_{f.name}" for f in dataclasses.fields(config_class) if isinstance(f.default, bool)]
    foreign_options.refuse(foreign_options.typed(flags), known, name, f"see {PROG} {name} --help")
    argv = config_file.as_flags(recipe, flags) + flags
    options: dict[str, Any] = {"prog": f"{PROG} {name}", "description": about}
    if (shown := [visible(redacted(arg)) for arg in argv]) == argv:
        return tyro.cli(config_class, args=argv, **options)
    try:
        return tyro.cli(config_class, args=argv, **options, console_outputs=False)
    except SystemExit:  # What is wrong is said about the same options without secrets and escapes.
        tyro.cli(config_class, args=shown, **options)
        raise
