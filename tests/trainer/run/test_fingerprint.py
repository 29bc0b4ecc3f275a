"""What a run depends on: a change of it is refused and shown."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.support.runs import Stopper, config, stopped_at, train, world
from tests.support.small import small_policy
from trainer.run.fingerprint import inputs


def test_pitfall_15_what_changed_is_refused_and_shown(path: Path, tmp_path: Path, stopper: Stopper) -> None:
    here = world(tmp_path / "here")
    cfg = config("ppo", here, tmp_path / "out")
    stopped_at(cfg, stopper, 3)
    (here / "prompts.jsonl").rename(here / "moved.jsonl")
    train(dataclasses.replace(cfg, data=here / "moved.jsonl", keep_last=1, save_every=5), resume=True)  # the same data

    stopped_at(cfg := dataclasses.replace(cfg, data=here / "moved.jsonl"), stopper, 3)
    with pytest.raises(ValueError, match=r"is not the run that was saved:\n  lr: 0.0003 at the checkpoint, 0.5 now\n"):
        train(dataclasses.replace(cfg, lr=0.5), resume=True)
    with (here / "moved.jsonl").open("a") as file:
        file.write('{"prompt": "a"}\n')
    small_policy(1).save(here / "base" / "model")
    with pytest.raises(ValueError, match="this is not the run") as refused:
        train(cfg, resume=True)
    for line in (
        r"  data: the contents of .*moved.jsonl have changed \(sha256 \w{12}... then",
        "  model: the contents of",
    ):
        assert refused.match(line)
    assert "  lr" not in str(refused.value)


def test_pitfall_15_every_model_that_an_option_names_is_known(path: Path, tmp_path: Path) -> None:
    base, other = path / "base", tmp_path / "other"
    small_policy(2).save(other / "model")
    cfg = config("grpo", path, tmp_path / "run", reward=(f"a={base},{other}@0.5", "exact_answer"), eval_every=3)
    found = inputs(cfg)
    assert found.keys() == {"model", "data", f"reward ({base})", f"reward ({other})"}
    assert found["model"] == found[f"reward ({base})"] != found[f"reward ({other})"]
    small_policy(3).save(other / "model")
    assert {k for k, v in inputs(cfg).items() if found[k] != v} == {f"reward ({other})"}


def test_pitfall_15_the_code_of_a_reward_is_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home_made.py").write_text("def letters(prompts, responses, **_): return [1.0] * len(responses)\n")
    monkeypatch.syspath_prepend(tmp_path)
    here = world(tmp_path / "here")
    cfg = dataclasses.replace(config("ppo", here, tmp_path / "out"), reward="home_made:letters")
    before = inputs(cfg)
    assert any("home_made:letters" in name for name in before)
    (tmp_path / "home_made.py").write_text("def letters(prompts, responses, **_): return [2.0] * len(responses)\n")
    assert inputs(cfg) != before
