"""Folders and models as the tests of them find them: of ours, of others, damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.small import write
from trainer.cli import program as cli

THEIRS = {
    "checkpoint-500/model.safetensors": "weights", "checkpoints/checkpoint-500/model.safetensors": "weights",
    "checkpoints/step-0000002/state.json": "{}", "checkpoints/latest.json": "{}", "model/precious.bin": "weights",
    "model/model.safetensors": "weights", "model.old/model.safetensors": "weights", "value/notes.txt": "notes",
    "samples.jsonl": '{"a": 1}\n', "metrics.jsonl": '{"step": 1}\n', "report.html": "<html>mine</html>",
    "summary.json": "{}", "not_finite/a.txt": "a", "resolved.yaml": "# of another program\nstage: sft\nlr: 1\n",
    "train.jsonl": "{}", "data/prompts.jsonl": "{}", "sft/model/model.safetensors": "weights",
}  # fmt: skip
"""What other trainers, and people, leave behind, under names that are ours too."""


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def seen(folder: Path) -> dict[str, Any]:
    """Every file and folder, with its bytes and the time of its last change."""
    return {
        str(p.relative_to(folder)): (p.read_bytes() if p.is_file() else None, p.lstat().st_mtime_ns)
        for p in folder.rglob("*")
    }


def commands(here: Path) -> dict[str, list[str]]:
    model, few = ["--model", str(here / "base")], ["--steps", "1", "--batch-size", "2", "--quiet"]
    return {
        "sft": ["sft", *model, "--data", str(here / "sft.jsonl"), *few],
        "ppo": ["ppo", *model, "--data", str(here / "prompts.jsonl"), "--reward", "exact_answer", *few],
        "split": ["split", "--data", str(here / "sft.jsonl"), "--quiet"],
        "eval": ["eval", *model, "--lm-data", str(here / "sft.jsonl"), "--quiet"],
        "demo": ["demo", "--sft-steps", "1", "--quiet"],
    }


def one_line(capfd: Any, *words: str) -> None:
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    for word in ("rlhf-train: ", *words):
        assert word in said, said


def marked(out: Path) -> Path:
    """A folder in which a run of ours began, and did nothing."""
    text = f"# rlhf-train sft\n# {cli.version()}\nstage: sft\n"
    put(out, {"resolved.yaml": text})
    return out


ROOT = Path(__file__).parents[2]
LAYER = "model.layers.1.mlp.up_proj.weight"


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def reweigh(folder: Path, how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    weights = how(load_file(folder / "model.safetensors"))
    save_file({k: x.clone() for k, x in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def sft(model: Path, *more: str) -> int:
    data = write(model.parent / "d.jsonl", [{"prompt": "a", "response": "b"}] * 4)
    options = ("--steps", "1", "--batch-size", "2", "--quiet", "--out", str(model.parent / "out"))
    return cli.main(["sft", "--model", str(model), "--data", str(data), *options, *more])
