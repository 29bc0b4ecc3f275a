"""The trainer and the world outside: models on disk, reward functions, texts, and real data by the command line."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer_worlds import lines, ragged, small_policy, small_scalar, write
from trainer import ppo
from trainer.models import load_policy, load_scalar
from trainer.packing import Sample, pack
from trainer.rewards import reward_from
from trainer.rollout import Rollout
from trainer.text import decode, encode_pairs
from trainer.tiny import byte_tokenizer, tiny_policy

HERE = "tests.trainer_worlds"
ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real data is not there")


def reward(name: str) -> Any:
    return reward_from(name, small_policy().tokenizer, max_length=64, max_tokens=1000, device=torch.device("cpu"))


ROLLOUT = Rollout([Sample([2, 3, 4, 1], 2), Sample([2, 2, 5], 1)], [False, True], [[0.0, 0.0], [0.0, 0.0]])
RECORDS: list[dict[str, Any]] = [{"prompt": "a b"}, {"prompt": "a", "extra": {"answer": "7"}}]


def test_saved_models_hold_no_pickle_and_speak_as_before(tmp_path: Path) -> None:
    policy, scalar, packed = small_policy(), small_scalar(), pack(ragged(6))
    scalar.set_statistics(torch.tensor([1.0, 3.0]))
    for name, model in {"policy": policy, "scalar": scalar}.items():
        model.save(tmp_path / name / "model")
        suffixes = {f.suffix for f in (tmp_path / name).rglob("*") if f.is_file()}
        assert ".safetensors" in suffixes
        assert suffixes <= {".safetensors", ".json"}
    with torch.no_grad():
        assert torch.equal(load_policy(str(tmp_path / "policy")).stats(packed).logp, policy.stats(packed).logp)
        again = load_scalar(str(tmp_path / "scalar"))
        assert torch.equal(again.scores(packed), scalar.scores(packed))
        torch.testing.assert_close(again.scores(packed), again.raw_scores(packed) - 2)
        # A new head on an old backbone: another number per token from the same hidden states.
        fresh = load_scalar(str(tmp_path / "policy"), torch.Generator().manual_seed(0))
        torch.testing.assert_close(fresh.values(packed), fresh.head(policy.hidden(packed)).squeeze(-1))


def test_an_interrupted_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, packed = small_policy(0), small_policy(1), pack(ragged(3))
    old.save(tmp_path / "model")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(type(new.tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        new.save(tmp_path / "model")
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.equal(load_policy(str(tmp_path)).stats(packed).logp, old.stats(packed).logp)
        new.save(tmp_path / "model")
        assert torch.equal(load_policy(str(tmp_path)).stats(packed).logp, new.stats(packed).logp)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_rewards_from_functions() -> None:
    assert reward(f"{HERE}:share_of_a")(ROLLOUT, RECORDS).tolist() == [0.0, 0.5]
    assert reward("exact_answer")(ROLLOUT, RECORDS).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="short_reward gave 1 scores for 2 responses"):
        reward(f"{HERE}:short_reward")(ROLLOUT, RECORDS)
    with pytest.raises(ValueError, match="gave nan to the response 'c', want a finite number"):
        reward(f"{HERE}:broken_reward")(ROLLOUT, RECORDS)
    for name in ("nowhere:at_all", "no_such_function", f"{HERE}:nothing"):
        with pytest.raises(ValueError, match=r"reward: got .* want a reward model's folder or module:function"):
            reward(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nltkk\ndef f(*_): ...", r"ModuleNotFoundError: No module named 'nltkk' \(line 1\)"),
        ("def f(*_): ...\ndef g(:", r"SyntaxError: invalid syntax \(of_mine_1.py, line 2\)"),
        ("def f(*_): ...\n1 / 0", r"ZeroDivisionError: division by zero \(line 2\)"),
    ],
)
def test_a_module_that_is_there_and_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    """Its own fault is told: it is no reward that does not exist."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    name = f"of_mine_{'def g(' in text:d}"
    (tmp_path / f"{name}.py").write_text(text)
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=rf"^reward: got '{name}:f', which is in .*{name}\.py, but .*fails: {said}$"):
        reward(f"{name}:f")


def test_a_reward_model_reads_the_same_end_in_training_and_in_ppo(tmp_path: Path) -> None:
    """Pitfall 7: a response that ended scores as its text does in training, also under another tokenizer."""
    model = small_scalar()
    model.save(tmp_path / "same")
    texts = encode_pairs(model.tokenizer, ["a b", "a"], ["c", "a d"], 64, ended=[True, False])
    assert [s.tokens for s in texts] == [s.tokens for s in ROLLOUT.samples]
    with torch.no_grad():
        wanted = model.scores(pack(texts))
    torch.testing.assert_close(reward(str(tmp_path / "same"))(ROLLOUT, RECORDS), wanted)

    stranger = load_scalar(saved_bytes(tmp_path), torch.Generator().manual_seed(0))
    stranger.save(tmp_path / "other")
    texts = encode_pairs(stranger.tokenizer, ["a b", "a"], ["c", "a d"], 64, ended=[True, False])
    with torch.no_grad():
        torch.testing.assert_close(reward(str(tmp_path / "other"))(ROLLOUT, RECORDS), stranger.scores(pack(texts)))


def test_a_value_model_reads_the_ids_of_the_policy(tmp_path: Path) -> None:
    """A reward model with other tokens cannot start it; one that was asked for by name is refused."""
    small_policy().save(tmp_path / "model")
    data = write(tmp_path / "prompts.jsonl", [{"prompt": "a b"}, {"prompt": "c"}])
    load_scalar(saved_bytes(tmp_path), torch.Generator().manual_seed(0)).save(tmp_path / "reward" / "model")
    cfg = ppo.PPOConfig(
        model=str(tmp_path), data=data, out=tmp_path / "out", reward=str(tmp_path / "reward"), steps=1, batch_size=2,
        max_new_tokens=4, quiet=True,
    )  # fmt: skip
    ppo.train(cfg)
    assert load_scalar(str(tmp_path / "out" / "value")).tokenizer.get_vocab() == small_policy().tokenizer.get_vocab()
    with pytest.raises(ValueError, match="value_model: want the tokenizer of the policy"):
        ppo.train(dataclasses.replace(cfg, value_model=str(tmp_path / "reward")))


def saved_bytes(path: Path) -> str:
    """A policy with a tokenizer of its own."""
    tiny_policy(byte_tokenizer(["a b c d"], 300), 0, hidden=32).save(path / "bytes")
    return str(path / "bytes")


def test_every_text_survives_the_tiny_tokenizer(tmp_path: Path) -> None:
    texts = ["\n\nHuman: plain", " naïve Ωmega 漢字 \U0001f600\t", "a  b   c<eos>"]
    tokenizer = byte_tokenizer(["only plain english was seen in training"])
    samples = encode_pairs(tokenizer, ["", *texts][1:], texts, 4096)
    assert decode(tokenizer, [s.tokens[s.prompt_length :] for s in samples])[:2] == texts[:2]
    assert all(s.tokens[-1] == tokenizer.eos_token_id for s in samples)


def test_a_cut_response_has_no_end() -> None:
    tokenizer = small_policy().tokenizer
    (sample,) = encode_pairs(tokenizer, ["a b c d e f"], ["g h i j k l"], 8)
    assert decode(tokenizer, [sample.tokens]) == ["c d e f g h i j"]
    assert sample.prompt_length == 4


def rlhf_train(*argv: object) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "trainer", *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_data
def test_sft_and_reward_model_on_real_dialogues(tmp_path: Path) -> None:
    data = DATA / "hh_harmless_base.jsonl.gz"
    rlhf_train("sft", "--data", data, "--out", tmp_path / "sft", "--steps", 4, "--batch-size", 8, "--max-length", 256)
    losses = [step["loss"] for step in lines(tmp_path / "sft" / "metrics.jsonl")]
    assert len(losses) == 4
    assert losses[-1] < losses[0] < 8
    rlhf_train(
        "reward", "--model", tmp_path / "sft", "--data", data, "--out", tmp_path / "reward", "--steps", 3,
        "--batch-size", 8, "--max-length", 256, "--calibration", 8, "--calibration-new-tokens", 16,
    )  # fmt: skip
    assert len(lines(tmp_path / "reward" / "metrics.jsonl")) == 3
    config = load_scalar(str(tmp_path / "reward")).model.config
    assert config.reward_std > 0
    assert (tmp_path / "reward" / "report.html").exists()


@needs_data
def test_ppo_on_real_problems_with_a_function_reward(tmp_path: Path) -> None:
    for name, function in {"digits": f"{HERE}:share_of_digits", "exact": "exact_answer"}.items():
        rlhf_train(
            "ppo", "--data", DATA / "gsm8k_train.jsonl.gz", "--reward", function, "--out", tmp_path / name,
            "--steps", 2, "--batch-size", 16, "--max-new-tokens", 24, "--epochs", 1, "--truncation", "bootstrap",
        )  # fmt: skip
    steps = lines(tmp_path / "digits" / "metrics.jsonl")
    assert [s["objective/kl"] == 0 for s in steps] == [True, False]
    assert all(0 < s["objective/scores"] < 1 and s["rollout/sampler_delta"] < 1e-4 for s in steps)
    load_policy(str(tmp_path / "digits"))
    # A random model solves nothing. Equal scores are no reason to change: the policy stays where it was, and finite.
    assert [s["objective/kl"] for s in lines(tmp_path / "exact" / "metrics.jsonl")] == [0, 0]
