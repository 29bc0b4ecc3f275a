"""Pages of examples/ learn, with their tiny models.

Measured over six seeds each: PPO of 30 rollouts gains 0.70 to 1.17 of reward, GRPO of 30 steps 0.39 to 0.74.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.examples.pages import FOLDER, ROOT, page

pytest.importorskip("transformers")


def gain(rows: list[dict[str, float]]) -> float:
    """Mean reward of the last five rows, less that of the first three."""
    rewards = [row["reward"] for row in rows]
    return sum(rewards[-5:]) / 5 - sum(rewards[:3]) / 3


def test_ppo_learns_and_says_so(capsys: pytest.CaptureFixture[str]):
    rows = page("ppo").main(["--rollouts", "30"])
    assert gain(rows) > 0.4
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == [*rows[0], "a", "reply"]
    assert len(lines) == len(rows) == 30
    for i, (line, row) in enumerate(zip(lines, rows, strict=True)):
        numbers = [float(x) for x in line.split()[: len(row)]]
        assert numbers == pytest.approx(list(row.values()), rel=1e-2, abs=1e-6)
        assert row["rollout"] == i
        assert -1 <= row["reward"] <= 1
        assert 0 <= row["ended"] <= 1
        assert 0 <= row["clipfrac"] <= 1
        assert 1 <= row["tokens"] <= 8
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-4)  # The policy is still its reference.
    assert all(row["kl"] > 0 for row in rows[1:])
    assert rows[-1]["ended"] > 0.9 > rows[0]["ended"]


def test_grpo_learns_and_says_so(capsys: pytest.CaptureFixture[str]):
    rows = page("grpo_hf").main(["--steps", "30"])
    assert gain(rows) > 0.2
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == [*rows[0], "a", "reply"]
    for line, row in zip(lines, rows, strict=True):
        assert [float(x) for x in line.split()[:4]] == pytest.approx(list(row.values()), abs=1e-3)
    assert rows[0]["kl/token"] == pytest.approx(0, abs=1e-5)
    assert all(0 <= row["reward"] <= row["ended"] <= 1 for row in rows)


def test_an_objective_of_ones_own_learns_as_logits_do():
    rows = page("own_loss").main([])
    losses = [row["loss"] for row in rows]
    assert losses[-1] < losses[0] - 1
    assert max(row["gap"] for row in rows) < 1e-5
    assert losses == pytest.approx([row["plain"] for row in rows], rel=1e-5, abs=1e-6)
    assert rows[0]["ratio"] == pytest.approx(1, abs=1e-5)
    assert rows[-1]["ratio"] > 1.5  # The gate has been felt.


def test_a_wrong_objective_of_ones_own_is_seen():
    """What the page compares with does not follow every mistake of an objective."""
    own_loss = page("own_loss")
    right = own_loss.objective
    own_loss.objective = lambda stats, cu, old_logp, advantages, share: right(stats, cu, old_logp, advantages, share**2)
    assert max(row["gap"] for row in own_loss.main([])) > 0.1


def test_the_command_runs_and_what_it_saves_is_a_model_like_any_other(tmp_path: Path):
    """What a folder suggests to samplers is not what PPO samples from, and is left in it."""
    command = [sys.executable, str(FOLDER / "ppo.py"), "--rollouts", "1", "--save", str(tmp_path)]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True, env=here)
    printed = [line.split()[0] for line in done.stdout.splitlines()]  # Installed packages may print there, too.
    assert [word for word in printed if word == "rollout" or word.isdigit()] == ["rollout", "0"]
    file = tmp_path / "generation_config.json"
    suggested = json.loads(file.read_text())
    assert "max_new_tokens" not in suggested
    file.write_text(json.dumps(suggested | {"do_sample": True, "top_k": 1, "eos_token_id": [1, 3]}))

    ppo, seen = page("ppo"), []
    sample = ppo.sample
    ppo.sample = lambda *args: seen.append(sample(*args)) or seen[-1]
    ppo.main(["--model", str(tmp_path), "--rollouts", "1", "--save", str(tmp_path / "again"), "--new-tokens", "6"])
    sequences, starts, lengths, ended = seen[0]
    replies = [s[n:].tolist() for s, n in zip(sequences, starts, strict=True)]
    assert len({tuple(r) for r in replies}) > 16  # With top_k of one there would be one for each of 16 prompts.
    assert {r[-1] for r, done in zip(replies, ended, strict=True) if done} == {1, 3}
    assert all(not {1, 3} & {*r[:-1]} for r in replies)
    assert [len(r) for r in replies] == lengths.tolist()
    assert all(len(r) == 6 and r[-1] not in (1, 3) for r, done in zip(replies, ended, strict=True) if not done)
    assert json.loads((tmp_path / "again" / file.name).read_text())["top_k"] == 1
