"""`rlhf-train pipeline RECIPE`: several stages, one after the other, each in its own folder of one run folder.

Everything that can be wrong with a recipe is told before anything is done. A pipeline that was stopped goes on where it
was: a stage with a summary is finished, the one under way goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.base import config as config_file
from trainer.base import permission
from trainer.base.address import HIDDEN, redacted, secrets_of
from trainer.base.console import Console, Parser, say
from trainer.base.files import write_whole
from trainer.base.subcommands import STAGES, TOOLS, Stage
from trainer.base.threads import TINY, one_bar_only, set_threads, used_threads
from trainer.cli import foreign_options, recipe, run_stage
from trainer.cli.recipe import Work
from trainer.report import page as report
from trainer.rewards.names import sources_of
from trainer.run import fingerprint, lock, log
from trainer.run import folder as run_folder
from trainer.run.records import records
from trainer.training.defaults import decided

PIPELINE = "pipeline"
ABOUT = """\
Runs the stages of a recipe in their order, each with its own options and in
its own folder OUT/NAME, and writes one report about all of them. The whole
recipe is checked before any work. The same command again goes on where it was
stopped; so does `rlhf-train resume OUT`."""
FORMAT = """\
recipes that come with it: {names}

a recipe of your own is a YAML file; ${{NAME}} stands for a variable or for the
folder of an earlier stage:

  vars:
    data: pairs.jsonl          # --set data=FILE wins
  stages:
    sft:                       # or any name, and `stage: sft` under it
      model: MODEL
      data: ${{data}}
    dpo:
      model: ${{sft}}
      data: ${{data}}"""


def stages() -> dict[str, Stage]:
    """What a recipe may hold: every stage that is told by a config what to do."""
    inspect = Stage("trainer.inspect.stage", "InspectConfig", "inspect_data", TOOLS["inspect"][1])
    return {name: stage for name, stage in STAGES.items() if name != "demo"} | {"inspect": inspect}


def planned(out: Path) -> bool:
    """Whether the run folder is that of a pipeline."""
    path = out / config_file.RESOLVED
    return path.is_file() and f"stage: {PIPELINE}".encode() in path.read_bytes().split(b"\n")


def main(argv: Sequence[str]) -> int:
    """Checks a recipe, then runs it.

    Args:
        argv: Arguments after the subcommand.

    Returns:
        0.

    Raises:
        ValueError: The recipe asks for what does not exist, or the folder was begun with another one.
    """
    options = _options(argv)
    path = recipe.find(options.recipe)
    out = (options.out or Path("runs") / path.stem).absolute()
    read = recipe.read(path, out, dict(map(_setting, options.set)), stages())
    if options.quiet:
        read = read._replace(steps=[s._replace(options=s.options | {"quiet": True}) for s in read.steps])
    models = {str(s.options.get("model", TINY)) for s in read.steps if s.stage not in ("inspect", "split")}
    tiny = all(model == TINY or model.startswith(str(out)) for model in models)
    set_threads(options.threads if options.threads is not None else read.threads, default=1 if tiny else None)
    work = [_work(read, step) for step in read.steps]
    one_bar_only()
    from trainer.cli.check import check_work

    inputs = check_work(read, work, load=not options.check)
    if options.check:
        say(f"{path}: nothing wrong with {', '.join(w.name for w in work)}")
        return 0
    plan = _plan(work, inputs)
    if planned(out) and not options.overwrite:
        began = recipe.read(out / config_file.RESOLVED, out, {}, stages())
        _compare(began, plan, work)
        work = [_on_its_day(w, began) for w in work]
        if (out / run_folder.SUMMARY).exists():
            say(f"{out} holds a finished run: nothing to do")
            return 0
        left = [w for w in work if not w.done]  # What is finished is only read, and may lie on another disk.
        run_folder.refuse_links(out, folders=[w.name for w in left])
        for w in left:
            run_folder.refuse_links(w.config.out)
    else:
        run_folder.check_folder(out, overwrite=options.overwrite, reads=[w.config for w in work])
        run_folder.refuse_links(out, folders=[w.name for w in work])
        for w in work:
            run_folder.check_folder(w.config.out, overwrite=options.overwrite, reads=[w.config])
        for folder in (w.config.out for w in work):
            if folder.exists():  # Where nothing has begun, no folder is made before ours is marked.
                run_folder.claim(folder, overwrite=options.overwrite)
        run_folder.claim(out, overwrite=options.overwrite)
        comments = [f"{run_stage.PROG} {PIPELINE} {shlex.join(_safe(argv, work))}", config_file.version()]
        _write(out / config_file.RESOLVED, plan | {"threads": used_threads()}, comments)
    try:
        with lock.alone(out):
            _go(out, work)
    except BaseException:
        run_stage.say_how_to_go_on(out, [w.config for w in work])
        raise
    return 0


def _go(out: Path, work: Sequence[Work]) -> None:
    """Every stage that is not finished, then what they have in common."""
    for number, w in enumerate(work, start=1):
        console = Console(w.config.quiet)
        about = f"stage {number} of {len(work)}: {w.name}"
        if w.done:
            console.note(f"{about} is finished")
            continue
        console.note(f"\n{about}" + (f" ({w.stage})" if w.stage != w.name else ""))
        run_folder.refuse_others(w.config.out)
        resumable = run_stage.resumable(w.run)
        if not resumable:
            run_folder.claim(w.config.out, overwrite=True)
        header = {"stage": w.stage, "threads": used_threads()}
        config_file.write_resolved(
            w.config.out, decided(w.config), [f"stage {w.name} of a pipeline, {config_file.version()}"], header
        )
        run_stage.run_stage(w.stage, w.run, w.config, **({"resume": True} if resumable else {}))
        gather(out, work)
    log.RunLog(out, quiet=True).summary(gather(out, work))
    say(f"\nreport: {report.write(out)}")


def gather(out: Path, work: Sequence[Work]) -> dict[str, Any]:
    """Puts the logs of all stages together in the run folder, for one report, under the names in the recipe.

    Returns:
        What their summaries say: verdicts, and a section per stage or, where a stage has several, per section.
    """
    verdicts: list[Any] = []
    sections: dict[str, Any] = {}
    logs: dict[str, list[dict[str, Any]]] = {
        name: [] for name in (run_folder.METRICS, run_folder.SAMPLES, run_folder.ALARMS)
    }
    for w in work:
        for name, lines in logs.items():
            for record in records(w.config.out / name):
                title = f"{w.name}: {record.get('title', 'samples')}" if name == run_folder.SAMPLES else None
                lines.append(record | ({"title": title} if title else {"stage": w.name}))
        if not w.done:
            continue
        found = json.loads((w.config.out / run_folder.SUMMARY).read_text(encoding="utf-8"))
        told = [v | {"title": f"{w.name}: {v.get('title', '')}"} for v in found.pop("verdicts", [])]
        verdicts += told
        for name, section in found.items():
            if isinstance(section, Mapping):
                sections[w.name if len(found) == 1 else f"{w.name}: {name}"] = section
    for name, lines in logs.items():
        if lines:
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in lines)
            write_whole(out / name, text.encode(errors="backslashreplace"))
    return {"verdicts": verdicts, **sections}


def _work(read: recipe.Recipe, step: recipe.Step) -> Work:
    """The stage's module, and its options as it takes them."""
    known = stages()[step.stage]
    module = importlib.import_module(known.module)
    kind = getattr(module, known.config)
    foreign_options.refuse(step.options, [f.name for f in dataclasses.fields(kind)], f"{read.source}: {step.name}")
    try:
        config = run_stage.parse(step.stage, kind, step.options, [], str(read.source), about=known.about)
    except SystemExit:
        say(f"{run_stage.PROG}: this is about the stage {step.name} of {read.source}", error=True)
        raise
    return Work(step.name, step.stage, getattr(module, known.run), config)


def _plan(work: Sequence[Work], inputs: Mapping[str, str]) -> dict[str, Any]:
    """All there is to know in order to do the same again, from any folder, as a recipe."""
    earlier: dict[str, str] = {}
    found: dict[str, Any] = {}
    for w in work:
        options = {name: value for name, value in config_file.resolved(w.config).items() if name != run_stage.OUT}
        found[w.name] = {"stage": w.stage} | {k: recipe.portable(v, earlier) for k, v in options.items()}
        earlier[w.name] = str(w.config.out)
    return {"stage": PIPELINE, "inputs": dict(inputs), "stages": found}


def _on_its_day(w: Work, began: recipe.Recipe) -> Work:
    """A stage with the day on which the whole run began, which some chat templates write."""
    day = next((s.options.get("template_date") for s in began.steps if s.name == w.name), None)
    return w._replace(config=dataclasses.replace(w.config, template_date=day)) if day else w


def _compare(then: recipe.Recipe, now: Mapping[str, Any], work: Sequence[Work]) -> None:
    """Refuses to go on with another recipe, or other data, than the run began with."""
    began = {
        s.name: {"stage": s.stage, **{k: v for k, v in s.options.items() if k != run_stage.OUT}} for s in then.steps
    }
    differ: list[str] = []
    if list(began) != list(now["stages"]):
        differ.append(f"stages: {', '.join(began)} at the beginning, {', '.join(now['stages'])} now")
    for w in work:
        mine = {"stage": w.stage} | config_file.resolved(w.config)
        differ += [
            f"{w.name}: {line.replace('the checkpoint', 'the beginning')}"
            for line in fingerprint.differences(began.get(w.name, {}), mine, {})
        ]
    differ += [f"{k}: its contents have changed" for k, v in now["inputs"].items() if then.inputs.get(k, v) != v]
    if differ:
        raise ValueError(
            "pipeline: the run folder was begun otherwise:\n  " + "\n  ".join(differ) + "\nPut back what was there, "
            "start a new run with another --out, or throw the old one away with --overwrite."
        )


def _write(path: Path, plan: Mapping[str, Any], comments: Sequence[str]) -> None:
    import yaml

    body = yaml.safe_dump(dict(plan), sort_keys=False, allow_unicode=True)
    write_whole(path, (config_file.comment(comments) + body).encode())


def _safe(argv: Sequence[str], work: Sequence[Work]) -> list[str]:
    """The command without what a variable brought into an address."""
    secrets = {secret for w in work for _, name in sources_of(w.config) for secret in secrets_of(name)}
    return [f"{arg.partition('=')[0]}={HIDDEN}" if arg.partition("=")[2] in secrets else arg for arg in argv]


def _setting(text: str) -> tuple[str, Any]:
    import yaml

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"--set: got {redacted(text)!r}, want NAME=VALUE")
    try:
        return name, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"--set: {name} is not valid YAML: {' '.join(str(error).split())}") from None


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog=f"{run_stage.PROG} {PIPELINE}", description=ABOUT, epilog=FORMAT.format(names=", ".join(recipe.names())),
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("recipe", metavar="RECIPE", help="a file, or the name of a recipe that comes with it")
    parser.add_argument("--out", type=Path, help="the run folder (default: runs/RECIPE)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable of the recipe")
    parser.add_argument("--check", action="store_true", help="check the recipe and do no more")
    permission.add_option(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads, for all stages")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in the same folder")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser.parse_args(argv)
