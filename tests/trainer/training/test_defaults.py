"""What an option is where nobody says it: today's values for a small model from scratch, gentle ones for the others."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support import runs
from tests.support.runs import config
from trainer.base import config as config_file
from trainer.base.subcommands import STAGES
from trainer.cli import program as cli
from trainer.training.defaults import TABLE, decided, open_in, options_of, parameters
from trainer.training.options import AUTO

PAGE = Path(__file__).parents[3] / "docs" / "trainer.md"
ROW = re.compile(r"\| (`--[^|]+) \| ([a-z, ]+) \| ([^|]+) \| ([^|]+) \|")
LESS = ", or a tenth of the optimizer steps if that is less"


def kind(stage: str) -> Any:
    return getattr(importlib.import_module(STAGES[stage].module), STAGES[stage].config)


def made(stage: str, **options: Any) -> Any:
    needed = {"data": Path("d.jsonl"), "reward": "exact_answer", "model": "tiny"} | options
    return kind(stage)(**{k: v for k, v in needed.items() if k in {f.name for f in dataclasses.fields(kind(stage))}})


def folder(path: Path, count: int) -> str:
    """Of a model with so many numbers in its weights."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    half = count // 2
    parts = {"a": torch.zeros(half, dtype=torch.uint8), "b": torch.zeros(count - half, dtype=torch.uint8)}
    for i, (name, x) in enumerate(parts.items(), start=1):
        save_file({name: x}, path / f"model-{i:05d}-of-00002.safetensors")
    return str(path)


def test_the_documentation_has_all_of_them() -> None:
    written: dict[tuple[str, str], tuple[str, str]] = {}
    for options, stages, small, pretrained in ROW.findall(PAGE.read_text(encoding="utf-8")):
        for option in re.findall("--([a-z-]+)", options):
            for stage in stages.split(", "):
                if stage in STAGES:
                    written[stage, option.replace("-", "_")] = small.strip(), pretrained.strip().removesuffix(LESS)
    known = {stage: options_of(kind(stage)) for stage in STAGES}
    assert set(written) == {(stage, option) for stage, options in known.items() for option in options}
    for (stage, option), shown in written.items():
        values = known[stage][option]
        assert [type(v)(x) for x, v in zip(shown, values, strict=True)] == list(values), (stage, option)


def test_a_small_model_has_what_it_had() -> None:
    """Before there was a choice; the documented results of ``tiny`` hang on these numbers."""
    for cfg in (decided(made("sft")), decided(made("reward"))):
        assert (cfg.lr, cfg.warmup_steps, cfg.schedule) == (1e-3, 20, "cosine")
    ppo = decided(made("ppo"))
    assert (ppo.lr, ppo.value_lr, ppo.warmup_steps, ppo.schedule) == (3e-4, 1e-3, 10, "cosine")
    assert (ppo.epochs, ppo.minibatches, ppo.max_new_tokens) == (2, 2, 64)
    assert {decided(made(s)).lr for s in ("dpo", "ipo", "kto", "orpo", "simpo")} == {5e-5}
    assert decided(made("eval")).max_new_tokens == 128


def test_the_size_of_the_weights_decides(tmp_path: Path) -> None:
    small, large = folder(tmp_path / "small", 19_999_999), folder(tmp_path / "large", 20_000_000)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(small)
    for name, count, lr in (
        ("tiny", 0, 3e-4), (small, 19_999_999, 3e-4), (str(tmp_path / "run"), 19_999_999, 3e-4),
        (large, 20_000_000, 1e-5), ("somebody/on-the-hub", None, 1e-5),
    ):  # fmt: skip
        assert parameters(name) == count
        assert decided(made("grpo", model=name)).lr == lr
    (Path(large) / "model-00001-of-00002.safetensors").write_bytes(b"no weights")
    assert parameters(large) is None


def test_what_is_given_is_used_as_given_and_the_rest_is_decided() -> None:
    given = made("grpo", model="a/b", lr=0.5, epochs=3, warmup_steps=70, steps=40)
    cfg = decided(given)
    assert (cfg.lr, cfg.epochs, cfg.warmup_steps) == (0.5, 3, 70)
    assert (cfg.minibatches, cfg.max_new_tokens) == (1, 256)
    assert open_in(given)
    assert not open_in(cfg)
    assert decided(cfg) is cfg


@pytest.mark.parametrize(("steps", "options", "wanted"), [
    (3, {}, 1), (20, {}, 2), (60, {}, 6), (1000, {}, 10), (20, {"epochs": 2, "minibatches": 2}, 8),
])  # fmt: skip
def test_the_warm_up_of_a_pretrained_model_is_a_tenth_of_its_steps(steps: int, options: Any, wanted: int) -> None:
    assert decided(made("ppo", model="a/b", steps=steps, **options)).warmup_steps == wanted


def test_every_class_in_the_table_is_there() -> None:
    names = {base.__name__ for stage in STAGES for base in kind(stage).__mro__}
    assert set(TABLE) <= names


def test_a_run_says_what_it_chose_and_goes_on_with_it(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["sft", "--model", str(here / "base"), "--data", str(here / "sft.jsonl"), "--steps", "1"]
    assert cli.main([*argv, "--lr", "auto", "--warmup-steps", "3", "--out", str(tmp_path / "run")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"Chosen for a small model from scratch \(\S+ million parameters\): --lr 0.001 --sch", shown)
    found = config_file.load(tmp_path / "run" / "resolved.yaml")
    assert (found["lr"], found["warmup_steps"], found["schedule"]) == (0.001, 3, "cosine")
    assert cli.main([*argv[:-1], "1", "--config", str(tmp_path / "run" / "resolved.yaml"), "--overwrite"]) == 0
    assert "Chosen" not in capsys.readouterr().out


def test_from_python_it_is_the_same(here: Path, tmp_path: Path) -> None:
    cfg = config("sft", here, tmp_path / "run", steps=1)
    assert cfg.lr == AUTO
    runs.train(cfg)
    assert config_file.load(tmp_path / "run" / "resolved.yaml")["lr"] == 1e-3


def test_in_a_pipeline_each_stage_decides_for_the_model_that_it_finds(here: Path, tmp_path: Path) -> None:
    """What the stage before it has trained is not there when the recipe is read."""
    (tmp_path / "r.yaml").write_text(
        f"vars: {{lr: 0.5}}\nstages:\n  sft: {{model: tiny, data: {here}/sft.jsonl, steps: 1, lr: '${{lr}}'}}\n"
        f"  dpo: {{model: '${{sft}}', data: {here}/ranked.jsonl, steps: 1, beta: 0.2}}\n"
    )
    argv = ["pipeline", str(tmp_path / "r.yaml"), "--set", "lr=auto", "--out", str(tmp_path / "run"), "--quiet"]
    assert cli.main(argv) == 0
    for stage, lr in (("sft", 1e-3), ("dpo", 5e-5)):
        assert config_file.load(tmp_path / "run" / stage / "resolved.yaml")["lr"] == lr
    assert cli.main(argv) == 0
