"""Models: heads that are none, damage, and saving, which costs nobody a file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.families import policy
from tests.support.folders import change, reweigh, sft
from tests.support.small import small_policy, small_scalar, write
from trainer.cli import program as cli
from trainer.models import files as model_files
from trainer.models.loading import load_policy, load_scalar
from trainer.models.tiny import byte_tokenizer, tiny_policy
from trainer.rewards.sources import reward_from


@pytest.fixture
def model(tmp_path: Path) -> Path:
    small_policy().save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    small_scalar().save(tmp_path / "reward")
    return tmp_path / "reward"


# Heads


def test_who_judges_has_learnt_to(reward: Path, model: Path) -> None:
    """A head is drawn where one is to be trained, and nowhere else."""
    options: dict[str, Any] = {"max_length": 64, "max_tokens": 1000, "device": torch.device("cpu")}
    reward_from(str(reward), small_policy().tokenizer, **options)
    with pytest.raises(ValueError, match=r"model: .* is LlamaForCausalLM and has no head that scores, want a reward"):
        reward_from(str(model), small_policy().tokenizer, **options)
    assert load_scalar(str(model), torch.Generator().manual_seed(0)).head.out_features == 1
    reweigh(reward, lambda x: {k: v for k, v in x.items() if k != "score.weight"})
    for generator in (None, torch.Generator()):
        with pytest.raises(ValueError, match=r"1 missing \(score\.weight\)"):
            load_scalar(str(reward), generator)


def test_a_classifier_is_no_reward_model_and_a_reward_model_no_policy(reward: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 missing \(lm_head\.weight\); 1 unknown \(score\.weight\)"):
        load_policy(str(reward))
    config = transformers.LlamaConfig(**small_policy().model.config.to_dict() | {"num_labels": 3})
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "three")
    small_policy().tokenizer.save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="want one linear head with one output"):
        load_scalar(str(tmp_path / "three"))


# Damage

DATA = [{"prompt": "a", "response": "b"}] * 4
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no JSON": lambda m: (m / "config.json").write_text("{"),
    "a list": lambda m: (m / "config.json").write_text("[]"),
    "no heads": lambda m: change(m / "config.json", num_attention_heads=0),
    "a text for a number": lambda m: change(m / "config.json", hidden_size="wide"),
    "cut short": lambda m: os.truncate(m / "model.safetensors", 1000),
    "empty": lambda m: (m / "model.safetensors").write_bytes(b""),
    "a web page": lambda m: (m / "model.safetensors").write_text("<!doctype html><title>log in</title>" * 9),
    "half a tokenizer": lambda m: os.truncate(m / "tokenizer.json", 100),
    "no weights": lambda m: (m / "model.safetensors").unlink(),
    "nothing": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_model_costs_one_line(damage: str, model: Path, capfd: Any) -> None:
    DAMAGES[damage](model)
    assert sft(model) == 2
    said = capfd.readouterr().err
    assert said.startswith("rlhf-train: model: ")
    assert said.count("\n") == 1
    assert str(model) in said


OFFLINE = (
    "We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files. "
    "See 'https://huggingface.co/docs/transformers/installation#offline-mode'."
)


def test_a_model_that_is_nowhere_is_looked_for_beside_it(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Before a word about the network: it is a typing error more often than not."""

    def nothing(*_: Any, **__: Any) -> None:
        raise OSError(OFFLINE)

    monkeypatch.chdir(model.parent)
    monkeypatch.setattr(model_files.AutoTokenizer, "from_pretrained", nothing)
    (model.parent / "runs" / "sft" / "model").mkdir(parents=True)
    nor = "no such model in the Hugging Face cache, and none came from the hub: OSError: We couldn't connect"
    for name, said in (
        ("runs/sfft", f"there is no folder runs/sfft (did you mean runs/sft?), {nor}"),
        ("somebody/base", f"there is no folder somebody/base, {nor}"),
        (f"{model}l", f"there is no folder {model}l (did you mean {model}?), and no model on the Hugging Face hub has"),
    ):
        assert cli.main(["sft", "--model", name, "--data", str(write(Path("d"), DATA)), "--out", f"o/{len(name)}"]) == 2
        told = capfd.readouterr().err
        assert told.startswith(f"rlhf-train: model: {said}")
        assert told.count("\n") == 1
        assert "installation#offline-mode" in told
    monkeypatch.setattr(model_files, "try_to_load_from_cache", lambda *_: "somewhere/config.json")
    assert cli.main(["sft", "--model", "somebody/base", "--data", "d", "--out", "p"]) == 2
    assert capfd.readouterr().err.startswith("rlhf-train: model: somebody/base cannot be loaded: OSError: ")


@pytest.mark.parametrize("kind", ["policy", "judge"])
def test_an_end_that_the_model_does_not_know_is_refused(kind: str, model: Path, reward: Path) -> None:
    folder = model if kind == "policy" else reward
    tokenizer = small_policy().tokenizer
    tokenizer.add_special_tokens({"eos_token": "<|new|>"})
    tokenizer.save_pretrained(folder)
    said = rf"^model: the end-of-sequence token '<\|new\|>' of {folder} has the id 22, and the embedding has 22 rows: "
    with pytest.raises(ValueError, match=said):
        load_policy(str(folder)) if kind == "policy" else load_scalar(str(folder))


# Saving


def test_a_new_model_costs_nobody_his_files(model: Path) -> None:
    """Those that are the model go, stale shards among them; a card, notes and other formats stay."""
    theirs = {"README.md": "card", "pytorch_model.bin": "theirs", "onnx/model.onnx": "graph"}
    for name, text in theirs.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(text)
    (model / "latest").symlink_to("README.md")
    for stale in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja"):
        (model / stale).write_text("stale")
    small_policy(1).save(model)
    assert {name: (model / name).read_text() for name in theirs} == theirs
    assert os.readlink(model / "latest") == "README.md"
    assert not any("stale" in f.read_text(errors="replace") for f in model.glob("*.json"))
    assert not list(model.glob("model-*")) + list(model.glob("chat_template*"))
    assert torch.equal(load_policy(str(model)).weight, small_policy(1).weight)
    assert [p.name for p in model.parent.iterdir()] == ["model"]


def test_a_backup_beside_a_model_stays(model: Path) -> None:
    for name in ("model.old", "model.saving", "model.tmp"):
        shutil.copytree(model, model.with_name(name))
    small_policy(1).save(model)
    for name in ("model.old", "model.saving", "model.tmp"):
        assert torch.equal(load_policy(str(model.with_name(name))).weight, small_policy(0).weight)


def test_a_link_to_another_disk_stays_one(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(tmp_path / "scratch")
    for seed in (0, 1):
        small_policy(seed).save(tmp_path / "run" / "model")
        assert os.readlink(tmp_path / "run" / "model") == str(tmp_path / "scratch")
        assert torch.equal(load_policy(str(tmp_path / "scratch")).weight, small_policy(seed).weight)


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_whoever_dies_while_saving_loses_nothing(moment: int, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, between and after the two renames."""
    (model / "README.md").write_text("card")
    rename, calls = Path.rename, iter(range(9))

    def dies(self: Path, target: Any) -> Path:
        if next(calls) == moment:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        if moment == 2:
            patch.setattr(shutil, "rmtree", lambda path, **_: None)
        try:
            small_policy(1).save(model)
        except KeyboardInterrupt:
            assert moment < 2
    small_policy(2).save(model)
    assert (model / "README.md").read_text() == "card"
    assert torch.equal(load_policy(str(model)).weight, small_policy(2).weight)
    assert [p.name for p in model.parent.iterdir()] == ["model"]


SUGGESTED: dict[str, dict[str, Any]] = {
    "no do_sample": {"temperature": 0.9, "top_p": 0.6},
    "greedy": {"do_sample": False, "temperature": 0.9, "top_k": 20, "min_p": 0.1},
    "no padding": {"pad_token_id": -1},
    "one beam": {"length_penalty": 1.2, "early_stopping": True},
}


@pytest.mark.parametrize("what", SUGGESTED)
def test_what_a_model_suggests_for_sampling_is_kept_as_it_came(what: str, model: Path) -> None:
    """Transformers reads these and refuses to write them; many public models have them."""
    suggested = {"bos_token_id": 1, "eos_token_id": 1, **SUGGESTED[what]}
    (model / "generation_config.json").write_text(json.dumps(suggested))
    assert sft(model) == 0
    for _ in range(2):
        trained = load_policy(str(model.parent / "out"))
        trained.save(model.parent / "out" / "model")
        for name, value in suggested.items():
            assert getattr(trained.model.generation_config, name) == value
        written = json.loads((model.parent / "out" / "model" / "generation_config.json").read_text())
        assert suggested.items() <= ({"do_sample": False} | written).items()


def test_suggestions_in_the_configuration_itself_are_kept_too(model: Path) -> None:
    """Older models have no other place for them."""
    (model / "generation_config.json").unlink()
    change(model / "config.json", temperature=0.9, top_p=0.6)
    assert sft(model) == 0
    found = load_policy(str(model.parent / "out")).model.generation_config
    assert (found.temperature, found.top_p) == (0.9, 0.6)


@pytest.mark.parametrize("bad", [999, -1])
def test_an_end_that_no_row_stands_for_is_refused(tmp_path: Path, bad: int):
    tiny_policy(byte_tokenizer(["ab"], 258), 0, hidden=32, layers=1).save(tmp_path)
    options = json.loads((file := tmp_path / "generation_config.json").read_text())
    file.write_text(json.dumps(options | {"eos_token_id": [1, bad]}))
    with pytest.raises(ValueError, match=rf"has the id {bad}, and the embedding has 258 rows"):
        load_policy(str(tmp_path))


def test_the_end_of_a_turn_is_told_to_whoever_loads_the_model(tmp_path: Path):
    """Gemma's tokenizer ends sequences with one token and its template turns with another."""
    made = policy("gemma2")
    made.model.generation_config.eos_token_id = made.tokenizer.eos_token_id
    made.save(tmp_path / "base")
    mine = load_policy(str(tmp_path / "base"))
    turn = mine.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert set(mine.ends) == {mine.tokenizer.eos_token_id, turn}
    mine.save(tmp_path / "trained")
    assert turn in json.loads((tmp_path / "trained" / "generation_config.json").read_text())["eos_token_id"]
