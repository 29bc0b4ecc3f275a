"""YAML of others, in a config, a recipe or a run folder: one line says what is wrong, and no word leads elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("yaml")
pytest.importorskip("tyro")

import yaml

from tests.support.foreign import Place, made  # noqa: F401 (a fixture)
from tests.support.pipelines import environment  # noqa: F401 (a fixture)
from tests.support.small import write
from tests.trainer.base.test_console import COLOURS
from trainer.base import config as config_file
from trainer.base.console import UNSEEN
from trainer.cli import program as cli
from trainer.stages.rl.grpo import GRPOConfig

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)
)
BAD_YAML = [
    (BOMB, "has more than 10000 values, counting aliases"),
    ("reward: &a [*a]\n", "has more than 10000 values, counting aliases"),
    ("reward: !!python/object/apply:os.system [echo]\n", "is not valid YAML: could not determine a constructor"),
    ("reward: !!python/name:os.system\n", "is not valid YAML"),
    ("lr: " + "9" * 5000 + "\n", "is not valid YAML: Exceeds the limit"),
    ("lr: 2020-99-99\n", "is not valid YAML: month must be"),
    ("[" * 1200, "is not valid YAML"),
    ("? [1]\n: 2\n", "is not valid YAML"),
    ('reward: "\\e]0;mine\\a"\n', "line 1 holds control characters"),
    ('lr: 1\n"a\\x9b": 2\n', "line 2 holds control characters"),
    ("x: " + "y" * 300_000, "has more than 256 KiB, want a recipe"),
    ("lr: 1\nlr: 2\n", "'lr' stands twice, the second time in line 2"),
    ("reward: [a, --out=/elsewhere]\n", "reward: got '--out=/elsewhere' in a list, want values that do not look like"),
    ("clip: [-1, --overwrite]\n", "clip: got '--overwrite' in a list"),
    ("--out: x\n", "unknown option '__out'"),
]


@pytest.mark.parametrize(
    ("text", "message"), BAD_YAML, ids=[f"{i}-{message[:30]}" for i, (_, message) in enumerate(BAD_YAML)]
)
def test_yaml_of_others_costs_one_line(place: Place, capsys: Any, text: str, message: str) -> None:
    """As a config, as a stage of a recipe, and as a run folder to resume."""
    more = "data: d.jsonl\n" + ("reward: exact_answer\n" if "reward" not in text else "")
    (place.path / "c.yaml").write_text(text + ("\n" + more if message.endswith(("list", "like")) else ""))
    inner = "".join(f"    {line}\n" for line in (place.path / "c.yaml").read_text().splitlines())
    (place.path / "r.yaml").write_text("stages:\n  grpo:\n" + inner)
    (place.path / "old").mkdir()
    (place.path / "old" / "resolved.yaml").write_text((place.path / "c.yaml").read_text() + "\nstage: grpo\n")
    for argv in (
        ["grpo", "--config", "c.yaml", "--out", "out"],
        ["pipeline", "r.yaml", "--out", "out"],
        ["resume", "old"],
    ):
        assert cli.main(argv) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert len(said) < 1000
        assert message.partition("line ")[0].removesuffix("the second time in ") in said or argv[0] == "pipeline"
    assert not place.out.exists()


def test_a_recipe_says_what_it_means_by_names_of_its_own_only(place: Place, capsys: Any) -> None:
    """Nested lists, and variables of the environment that are none of its business."""
    for options, message in (
        ({"reward": [["a"]]}, "grpo: reward must be a plain value or a list of them"),
        ({"reward": "http://h/x?k=${AWS_SECRET_ACCESS_KEY}"}, "${AWS_SECRET_ACCESS_KEY} is neither a variable nor"),
        ({"reward": "http://h/x?k=${REWARD_KEY}"}, "wants the environment variable REWARD_KEY, which is not set"),
        ({"reward": "exact_answer", "lr": "${HOME}"}, "${HOME} is neither a variable nor an earlier stage"),
    ):
        assert cli.main(["pipeline", place.recipe(**options), "--check"]) == 2
        assert message in capsys.readouterr().err


def test_a_name_of_a_file_cannot_write_into_the_configuration(place: Place) -> None:
    odd = place.path / "x\nreward: theirs:f\nb\x1b]0;t\x07"
    odd.mkdir()
    config = GRPOConfig(data=odd / "d.jsonl", reward="exact_answer", out=place.out)
    text = config_file.write_resolved(place.out, config, [f"rlhf-train grpo --data {odd}"]).read_text()
    assert "\x1b" not in text
    assert yaml.safe_load(text)["reward"] == "exact_answer"
    assert config_file.as_flags({"clip": [-0.1, -1e-3, float("-inf")], "x": ["a-b"]}, []) == [
        "--clip", "-0.1", "-0.001", "-inf", "--x", "a-b",
    ]  # fmt: skip


def test_what_turns_lines_around_is_in_lawful_names_and_never_on_the_screen(place: Place, capsys: Any) -> None:
    """tyro quotes a value that is none; a run in such a folder can go on."""
    named = place.out.with_name("r\u200fun")
    data = write(place.path / "d\u200e.jsonl", [{"prompt": "a", "response": "b"}])
    argv = ["sft", "--model", "tiny", "--data", str(data), "--out", str(named), "--steps", "1", "--save-every", "1"]
    assert cli.main(argv) == 0
    (named / "summary.json").unlink()
    assert cli.main(["resume", str(named)]) == 0
    config = place.out.with_name("c.yaml")
    config.write_text('precision: "\\u202ex\\u2066y"\n', encoding="utf-8")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main([*argv, "--overwrite", "--config", str(config)])
    told = capsys.readouterr()
    assert "x" in told.err
    assert not UNSEEN.search(COLOURS.sub("", told.out + told.err))


def test_flags_and_names_meet_in_every_spelling():
    recipe = {"max_tokens": 5, "amp": True, "data": "d"}
    assert config_file.as_flags(recipe, ["--max-tokens=9", "--no-amp"]) == ["--data=d"]
    assert config_file.as_flags(recipe, ["--max_tokens", "9", "--amp", "--data", "e"]) == []
