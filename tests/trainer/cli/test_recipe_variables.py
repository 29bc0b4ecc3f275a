"""What `${names}` in a recipe stand for, and what they cannot do: they call nothing, and have bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml")
import yaml

from trainer.cli import recipe

KNOWN = ("sft", "dpo", "inspect")


def options(path: Path, stages: dict[str, Any], **variables: Any) -> list[Any]:
    """Of every stage, as a run gets them."""
    given = variables.pop("given", {})
    (path / "r.yaml").write_text(yaml.safe_dump({"vars": variables, "stages": stages}, sort_keys=False))
    return [step.options for step in recipe.read(path / "r.yaml", path / "run", given, KNOWN).steps]


def test_names_stand_for_variables_made_of_variables_and_for_earlier_stages(tmp_path: Path) -> None:
    stages = {
        "sft": {"data": "${train}", "steps": "${steps}", "lr": 1},
        "next-one": {"stage": "dpo", "model": "${sft}", "data": ["${train}", "x${root}${root}", "${sft}/train.jsonl"]},
        "dpo": {"model": "${next-one}", "reward": "http://h/${REWARD_KEY}$1", "clip": "${pair}"},
    }
    found = options(
        tmp_path, stages, given={"root": "/b"}, root="/a", train="${root}/t", steps=5, pair=[0.1, "${steps}"]
    )
    run = str(tmp_path / "run")
    assert found == [
        {"data": "/b/t", "steps": 5, "lr": 1, "out": f"{run}/sft"},
        {"model": f"{run}/sft", "data": ["/b/t", "x/b/b", f"{run}/sft/train.jsonl"], "out": f"{run}/next-one"},
        {"model": f"{run}/next-one", "reward": "http://h/${REWARD_KEY}$1", "clip": [0.1, 5], "out": f"{run}/dpo"},
    ]


@pytest.mark.parametrize(
    "name",
    [
        "oc.env:HOME", "oc.decode:${x}", "oc.${x}:HOME", "${x}:HOME", "env:HOME", "HOME", ".x", "..stages.sft.data",
        "stages.sft.data", "x.0", "x[0]", " x", "x ", "",
    ],
)  # fmt: skip
def test_nothing_but_a_name_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Neither functions, as libraries of configurations have them, nor paths, nor the environment."""
    monkeypatch.setenv("HOME", "the-secret")
    for stage, variables in (({"model": f"${{{name}}}"}, {}), ({"model": "${y}"}, {"y": f"a${{{name}}}"})):
        with pytest.raises(ValueError, match=r"r\.yaml: (sft: model|vars: y): \$\{.* is neither") as told:
            options(tmp_path, {"sft": stage}, x="env", **variables)
        assert "the-secret" not in str(told.value)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"a": "${b}", "b": "1"}, r"vars: a: \$\{b\} is neither a variable nor"),
        ({"a": "${a}"}, r"vars: a: \$\{a\} is neither"),
        ({"a": "${sft}"}, r"vars: a: \$\{sft\} is no earlier stage"),
        ({"b": None, "a": "${b}/x"}, "vars: a: the variable b has no value; give it one with --set b="),
        ({"a": {"b": 1}}, "vars: a must be a plain value or a list of them"),
        ({"b": [1], "a": ["${b}"]}, "vars: a must be a plain value or a list of them"),
        ({"a": "x" * 9000, "b": "${a}!"}, "vars: b: what its variables stand for has more than 8 KiB"),
        ({"v0": "x" * 99} | {f"v{i + 1}": f"${{v{i}}}${{v{i}}}" for i in range(60)}, "vars: v7: what its variables"),
    ],
    ids=["later", "itself", "a stage", "without a value", "a mapping", "lists in lists", "long", "doubling"],
)
def test_variables_of_variables_end(tmp_path: Path, variables: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(tmp_path, {"sft": {"model": "x"}}, **variables)
