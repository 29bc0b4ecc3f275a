"""Recipes: what is wrong with one is told before any work, the shipped ones are whole, and the docs are true."""

from __future__ import annotations

import gzip
import json
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")
pytest.importorskip("tyro")
from tests.fault_worlds import world
from tests.pipeline_worlds import ALLOWED, STAGES, Cut, environment, written  # noqa: F401 (a fixture)
from tests.trainer_worlds import lines, write
from trainer import cli, recipe, split

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a model and a recipe."""
    path = tmp_path_factory.mktemp("recipes")
    world(path / "world")
    written(path, STAGES)
    return path


BAD: list[tuple[str, dict[str, Any] | None, str]] = [
    ("sft", {"stage": "sfd"}, "unknown stage 'sfd'; did you mean 'sft'?"),
    ("sft", {"stage": "demo"}, "unknown stage 'demo'; want one of dpo"),
    ("group", {"num_generation": 3}, "group: unknown option 'num_generation'; did you mean 'num_generations'?"),
    ("ppo", {"model": "${stf}"}, "ppo: model: ${stf} is neither a variable nor an earlier stage; did you mean ${sft}?"),
    ("reward", {"model": "${ppo}"}, "reward: model: ${ppo} is no earlier stage"),
    ("group", {"model": "${after}"}, "group: model: ${after} is no earlier stage"),
    ("reward", {"model": "${split}"}, "reward: model: split leaves no model"),
    ("sft", {"data": "${split}"}, "sft: data: ${split} is a folder, want a file in it"),
    ("sft", {"data": "${split}/test.jsonl"}, "sft: data: got test.jsonl, want train.jsonl or held_out.jsonl of split"),
    ("group", {"data": "${world}/prompt.jsonl"}, "prompts.jsonl?; the variables are world="),
    ("ppo", {"ptx_data": "${world}/none.jsonl", "ptx_coef": 0.1}, "none.jsonl does not exist"),
    ("sft", {"model": "./nowhere"}, "sft: model: ./nowhere is not the folder of a model"),
    ("sft", {"lr": 0}, "sft: lr: got 0.0, want a positive number"),
    ("sft", {"lr": "inf"}, "sft: lr: got inf, want a positive number"),
    ("sft", {"max_grad_norm": 0}, "sft: max_grad_norm: got 0.0, want a positive number"),
    ("group", {"num_generations": 1}, "group: num_generations: got 1, want at least 2"),
    ("group", {"reward": "tests.fault_worlds:late_letters"}, "reward: got 'tests.fault_worlds:late_letters', want"),
    ("group", {"reward": "${sft}"}, "group: reward: sft leaves no reward model"),
    ("after", {"judge": "${sft}"}, "sft leaves no reward model"),
    ("after", {"judge": None}, "after: judge: goes with data"),
    ("split", {"held_out": 1.0}, "split: held_out: got 1.0, want a share between 0 and 1"),
    ("sft", {"out": "elsewhere"}, "sft: out and threads are those of the whole pipeline"),
    ("sft", {"steps": {"a": 1}}, "sft: steps must be a plain value"),
    ("../sft", {}, "../sft: want a name of letters"),
    ("world", {"stage": "sft"}, "'world' is a variable and a stage"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD)
def test_bad_recipes_cost_one_line_and_no_work(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "world").symlink_to(place / "world")
    path = written(tmp_path, STAGES | {name: STAGES.get(name, {}) | changes})
    assert cli.main(["pipeline", str(path), "--out", str(tmp_path / "run"), *ALLOWED]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: {sft: {}, sft: {}}\n", "'sft' stands twice, the second time in line 1"),
        ("stages:\n  sft:\n    lr: 1\n    lr: 2\n", "'lr' stands twice, the second time in line 4"),
        ("stages: {}\n", "stages: got none"),
        ("stages: [sft]\n", "stages: want `name: value` lines, got ['sft']"),
        ("sft: {}\n", "is no recipe of several stages"),
        ("stages: {sft: {}}\nvar: {}\n", "unknown option 'var'; did you mean 'vars'?"),
        ("stages: {sft: [\n", "is not valid YAML"),
        (
            "vars: {data: }\nstages: {sft: {data: '${data}'}}\n",
            "variable data has no value; give it one with --set",
        ),
        ("threads: 0\nstages: {sft: {data: x}}\n", "threads: got 0"),
    ],
)
def test_bad_yaml_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert cli.main(["pipeline", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_mistakes_on_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = str(place / "recipe.yaml"), ["--out", str(tmp_path / "run")]
    for argv, message in (
        (["gsm8"], "gsm8 does not exist; did you mean gsm8k?"),
        (["whatever"], "want a file, or one of gsm8k, hh"),
        ([path, "--set", "word=1"], "--set: unknown option 'word'; did you mean 'world'?"),
        ([path, "--set", "world"], "--set: got 'world', want NAME=VALUE"),
        ([path, "--set", f"world={tmp_path}"], "ranked.jsonl does not exist"),
    ):
        assert cli.main(["pipeline", *argv, *out]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):  # what an option may hold is tyro's to say; which stage it was, ours
        cli.main(["pipeline", str(written(tmp_path, {"sft": {"data": "x", "steps": "many"}})), *out])
    assert "this is about the stage sft of" in capsys.readouterr().err
    assert cli.main(["pipeline", path, "--check", *out, *ALLOWED]) == 0
    assert "nothing wrong with facts, split, sft" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_split_keeps_prompts_together(tmp_path: Path) -> None:
    records = [{"question": f"q{i % 40}", "answer": str(i)} for i in range(120)]
    more = [*records, {"question": "other", "answer": "x"}]

    def parts(records: list[dict[str, Any]], **options: Any) -> list[list[dict[str, Any]]]:
        cfg = split.SplitConfig(data=write(tmp_path / "d.jsonl", records), out=tmp_path, quiet=True, **options)
        counts = split.run(cfg)
        found = [lines(tmp_path / name) for name in (split.TRAIN, split.HELD_OUT)]
        assert [len(part) for part in found] == list(counts.values())
        return found

    train, held_out = parts(records, held_out=0.3)
    assert not {r["question"] for r in train} & {r["question"] for r in held_out}
    assert sorted([*train, *held_out], key=str) == sorted(records, key=str)
    assert [int(r["answer"]) for r in train] == sorted(int(r["answer"]) for r in train)
    assert 5 <= len({r["question"] for r in held_out}) <= 19  # 12 of 40 are meant
    again = parts(more, held_out=0.3)
    assert [[r for r in part if r["question"] != "other"] for part in again] == [train, held_out]
    assert parts(records, held_out=0.3, seed=1) != [train, held_out]
    with pytest.raises(ValueError, match=r"held_out: got 0.3 of .*, which gives .*, want rows in both"):
        parts(records[:1], held_out=0.3)


def test_shipped_recipes_are_whole(tmp_path: Path) -> None:
    """Every option exists, every reference leads somewhere: with the right files nothing is refused."""
    assert recipe.names() == ["gsm8k", "hh"]
    pair = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c", "answer": "#### 4"}
    for name in ("gsm8k_train", "gsm8k_test", "gsm8k_ranked", "hh_harmless_base"):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(json.dumps(pair).encode()))
    for name, data in {"gsm8k": tmp_path, "hh": tmp_path / "hh_harmless_base.jsonl.gz"}.items():
        assert cli.main(["pipeline", name, "--set", f"data={data}", "--check"]) == 0
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "recipes/*.yaml" in found["trainer"]


COMMANDS = [
    shlex.split(line)[1:]
    for line in (ROOT / "docs" / "trainer.md").read_text().splitlines()
    if line.startswith("    rlhf-train ")
]


def test_commands_in_the_docs_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one names a stage and options that there are; and every stage is shown."""
    asked: list[str] = []

    def stop(name: str, *_: Any) -> None:
        asked.append(name)
        raise Cut

    monkeypatch.setattr(cli, "_provenance", stop)
    for argv in COMMANDS:
        if argv[0] in cli.STAGES:
            with pytest.raises(Cut):
                cli.main(argv)
    assert {*cli.STAGES} == {*asked}
    assert {argv[0] for argv in COMMANDS} >= {"inspect", "doctor", "resume", "report", "pipeline"}
