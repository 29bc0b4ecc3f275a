"""Every stage by its documented line, on a handful of rows, for a model that somebody has trained before."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer.cli import program as cli

ASKED = ("What is the capital of France?", "Is the sun a star?", "What colour is grass?", "How many legs has a cat?")
RIGHT = ("It is Paris.", "Yes, it is.", "It is green.", "It has four.")
WRONG = ("I would rather not say anything about that.", "No, a planet.", "Grass is blue, as we know.", "Nine, or so.")
ROWS = len(ASKED)

LINES = {
    "sft": "sft --model {model} --data {here}/demonstrations.jsonl --out {here}/sft",
    "reward": "reward --model {model} --data {here}/pairs.jsonl --calibration 0 --out {here}/reward",
    "ppo": "ppo --model {model} --data {here}/prompts.jsonl --reward {here}/reward --out {here}/ppo",
    "grpo": "grpo --model {model} --data {here}/prompts.jsonl --reward tests.real.mood:positive --out {here}/grpo",
    "dpo": "dpo --model {model} --data {here}/pairs.jsonl --out {here}/dpo",
    "ipo": "ipo --model {model} --data {here}/pairs.jsonl --out {here}/ipo",
    "kto": "kto --model {model} --data {here}/pairs.jsonl --out {here}/kto",
    "orpo": "orpo --model {model} --data {here}/pairs.jsonl --out {here}/orpo",
    "simpo": "simpo --model {model} --data {here}/pairs.jsonl --out {here}/simpo",
    "eval": "eval --model {here}/grpo --base {model} --data {here}/prompts.jsonl --judge tests.real.mood:positive"
    " --out {here}/eval",
}
SHORT = {  # Nothing but what keeps a run in minutes: each step sees all rows, so that losses compare.
    **dict.fromkeys(("sft", "reward", "dpo", "ipo", "orpo", "simpo"), f"--steps {{steps}} --batch-size {ROWS}"),
    "kto": f"--steps {{steps}} --batch-size {2 * ROWS}",
    "ppo": "--steps {steps} --batch-size 8 --max-new-tokens {tokens}",
    "grpo": "--steps {steps} --batch-size 2 --max-new-tokens {tokens}",
    "eval": "--max-new-tokens {tokens}",
}


def data(here: Path) -> None:
    """The files that the lines name."""
    asked = [[{"role": "user", "content": question}] for question in ASKED]
    _write(here / "prompts.jsonl", ({"prompt": a} for a in asked))
    _write(here / "demonstrations.jsonl", ({"prompt": a, "response": r} for a, r in zip(asked, RIGHT, strict=True)))
    pairs = zip(asked, RIGHT, WRONG, strict=True)
    _write(here / "pairs.jsonl", ({"prompt": a, "chosen": right, "rejected": wrong} for a, right, wrong in pairs))


def run(stage: str, model: str, here: Path, *, steps: int = 3, tokens: int = 32) -> None:
    """One stage, by the command line."""
    line = f"{LINES[stage]} {SHORT[stage]}".format(model=model, here=here, steps=steps, tokens=tokens)
    assert cli.main(shlex.split(line)) == 0, line


def metrics(folder: Path) -> list[dict[str, float]]:
    return _lines(folder / "metrics.jsonl")


def alarms(folder: Path) -> set[str]:
    """The names of those that were raised."""
    return {line["name"] for line in _lines(folder / "alarms.jsonl")} if (folder / "alarms.jsonl").exists() else set()


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
