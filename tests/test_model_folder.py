"""The folder of a model: nothing in it is run, it is whole or refused, and a new model costs nobody's files."""

from __future__ import annotations

import ast
import io
import json
import logging
import logging.handlers
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations import hub_kernels

from tests.trainer_worlds import small_policy, small_scalar, write
from trainer import cli, model_files
from trainer.chat import ChatTemplate, render_for
from trainer.inspect_data import inspect
from trainer.models import load_policy, load_scalar
from trainer.rewards import reward_from

ROOT = Path(__file__).parents[1]
LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    small_policy().save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    small_scalar().save(tmp_path / "reward")
    return tmp_path / "reward"


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def reweigh(folder: Path, how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    weights = how(load_file(folder / "model.safetensors"))
    save_file({k: x.clone() for k, x in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def sft(model: Path, *more: str) -> int:
    data = write(model.parent / "d.jsonl", [{"prompt": "a", "response": "b"}] * 4)
    options = ("--steps", "1", "--batch-size", "2", "--quiet", "--out", str(model.parent / "out"))
    return cli.main(["sft", "--model", str(model), "--data", str(data), *options, *more])


# Code


def test_every_call_that_reads_a_model_forbids_its_code() -> None:
    calls = []
    for file in sorted((ROOT / "trainer").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(node.func, "attr", "") if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and name in ("from_pretrained", "from_config"):
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                calls.append((f"{file.name}:{node.lineno}", given.get("trust_remote_code")))
    assert len(calls) >= 4
    assert [where for where, trust in calls if trust != "False"] == []


def config_of_their_own(folder: Path) -> None:
    auto = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    change(folder / "config.json", model_type="of_their_own", auto_map=auto)


def model_of_their_own(folder: Path) -> None:
    """A configuration that transformers knows, of a kind for which it has no class of ours."""
    kinds = {"AutoModelForCausalLM": "theirs.Model", "AutoModelForSequenceClassification": "theirs.Model"}
    change(folder / "config.json", model_type="vit", auto_map=kinds)


def tokenizer_of_their_own(folder: Path) -> None:
    change(folder / "config.json", model_type="vit")
    auto = {"AutoTokenizer": ["theirs.Tokenizer", None]}
    change(folder / "tokenizer_config.json", tokenizer_class="OfTheirOwn", auto_map=auto)


READERS: dict[str, Callable[[str], Any]] = {
    "policy": load_policy,
    "scalar": lambda path: load_scalar(path, torch.Generator()),
    "tokenizer": lambda path: render_for(path),
    "inspect": lambda path: inspect(Path(path).parent / "d.jsonl", tokenizer=path, with_baselines=False),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("theirs", [config_of_their_own, model_of_their_own, tokenizer_of_their_own])
def test_nobody_is_asked_whether_to_run_code(
    theirs: Callable[[Path], None], reader: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `y` waiting at the terminal."""
    theirs(model)
    write(model.parent / "d.jsonl", [{"prompt": "a", "response": "b"}] * 4)
    ran = model.parent / "ran"
    (model / "theirs.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise SystemExit('their code ran')\n")
    monkeypatch.setenv("HF_MODULES_CACHE", str(model.parent / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    whole = reader in ("policy", "scalar")
    if whole or theirs is tokenizer_of_their_own:
        with pytest.raises(ValueError, match=r"^model: .*\Z"):
            READERS[reader](str(model))
    else:
        READERS[reader](str(model))  # whatever the model is, its tokenizer is plain
    assert not ran.exists()
    assert asked == []


def test_code_beside_a_model_that_we_know_is_left_alone(model: Path) -> None:
    """Its architecture is one of transformers, whatever else the folder offers."""
    change(model / "config.json", auto_map={"AutoModelForCausalLM": "theirs.Model"})
    (model / "custom_generate").mkdir()
    for file in (model / "theirs.py", model / "custom_generate" / "generate.py"):
        file.write_text(f"open({str(model.parent / 'ran')!r}, 'w').close()\n")
    load_policy(str(model))
    assert not (model.parent / "ran").exists()


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
def test_kernels_that_a_configuration_names_are_not_fetched(
    key: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[Any] = []

    def fetch(*args: Any, **_: Any) -> None:
        fetched.append(args)
        raise ImportError("code from the hub")

    for name in ("lazy_import_flash_attention", "hub_kernels.load_and_register_attn_kernel"):
        monkeypatch.setattr(f"transformers.modeling_utils.{name}", fetch)
    monkeypatch.setattr(hub_kernels, "get_kernel", fetch)
    change(model / "config.json", **{key: "somebody/x"})
    loaded = load_policy(str(model)).model.config
    assert fetched == []
    assert "somebody/x" not in json.dumps(loaded.to_dict())
    assert loaded._attn_implementation == model_files.NAME


def test_nor_those_of_a_configuration_within(tmp_path: Path) -> None:
    inner = {"_attn_implementation": "somebody/x", "_experts_implementation": "somebody/x", "hidden_size": 8}
    whole = {"model_type": "gemma3", "text_config": inner, "fusion_config": {"patch_embeddings": True}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    config = model_files.config_of(str(tmp_path))
    assert config.text_config.hidden_size == 8
    assert config.text_config._attn_implementation is config.text_config._experts_implementation is None
    assert config.fusion_config is None


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("named", ["index", "config", "alone"])
def test_weights_in_pickles_are_refused(named: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whichever file they are named: an index of shards, config.json, or nobody."""
    monkeypatch.chdir(model)
    file = "adapter_model.bin" if named == "config" else "pytorch_model.bin"
    (model / file).write_bytes(pickle.dumps(Evil()))
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    if named == "index":
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    elif named == "config":
        change(model / "config.json", transformers_weights=file)
    opened: list[Any] = []
    monkeypatch.setattr(torch, "load", lambda *args, **_: opened.append(args))
    with pytest.raises((ValueError, OSError), match=r"^model: .*safetensors"):
        load_policy(str(model))
    assert opened == []
    assert not (model / "ran").exists()


def test_a_chat_template_lives_in_a_sandbox(model: Path) -> None:
    tokenizer = small_policy().tokenizer
    for theirs in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}"):
        tokenizer.chat_template = theirs
        with pytest.raises(ValueError, match="the chat template refuses this conversation: "):
            ChatTemplate(tokenizer)


# Weights


def add_layer(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return x | {k.replace("layers.1.", "layers.2."): v for k, v in x.items() if "layers.1." in k}


WEIGHTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "one missing": (lambda x: {k: v for k, v in x.items() if k != LAYER}, rf"LlamaForCausalLM: 1 missing \({LAYER}\)$"),
    "other names": (
        lambda x: {"module." + k: v for k, v in x.items()},
        r"\d+ missing \(lm_head.weight, .*, \.\.\.\); \d+ unknown \(module\..*, \.\.\.\)$",
    ),
    "a layer too many": (add_layer, r"9 unknown \(model\.layers\.2\.input_layernorm\.weight, "),
    "another shape": (
        lambda x: x | {LAYER: x[LAYER][:, 1:]}, rf"1 of another shape \({LAYER} \[\d+, 31\] for \[\d+, 32\]\)$",
    ),
    "NaN": (lambda x: x | {LAYER: x[LAYER] * float("nan")}, rf"NaN or infinity: 1 not finite \({LAYER}\)$"),
    "infinity": (lambda x: x | {LAYER: x[LAYER].fill_(-float("inf"))}, rf"NaN or infinity: 1 not finite \({LAYER}\)$"),
}  # fmt: skip


@pytest.mark.parametrize("what", WEIGHTS)
def test_a_model_that_is_not_whole_is_refused_by_name(what: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how, said = WEIGHTS[what]
    reweigh(model, how)
    printed = logging.handlers.BufferingHandler(100)
    monkeypatch.setattr(logging.getLogger("transformers.modeling_utils"), "handlers", [printed])
    with pytest.raises(ValueError, match=said) as refused:
        load_policy(str(model))
    assert str(refused.value).startswith(f"model: {model} ")
    assert "\n" not in str(refused.value)
    assert printed.buffer == [], "the table of transformers is not printed beside it"


def test_the_command_line_says_it_once(model: Path, capfd: Any) -> None:
    reweigh(model, WEIGHTS["one missing"][0])
    assert sft(model) == 2
    said = capfd.readouterr().err
    assert said.startswith("rlhf-train: model: ")
    assert said.count("\n") == 1


def test_a_tied_head_is_not_missing_and_old_buffers_are_no_news(tmp_path: Path) -> None:
    policy = small_policy()
    config = transformers.LlamaConfig(**policy.model.config.to_dict() | {"tie_word_embeddings": True})
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    reweigh(tmp_path, lambda x: x | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    loaded = load_policy(str(tmp_path))
    assert loaded.weight is loaded.model.get_input_embeddings().weight


def test_a_shard_that_is_missing_is_named(model: Path) -> None:
    small_policy().model.save_pretrained(model / "shards", max_shard_size="20KB")
    shards = sorted((model / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    small_policy().tokenizer.save_pretrained(model / "shards")
    load_policy(str(model / "shards"))
    shards[1].unlink()
    with pytest.raises((ValueError, OSError), match=rf"^model: .*{shards[1].name}"):
        load_policy(str(model / "shards"))


@pytest.mark.parametrize("kind", ["an adapter", "quantised"])
def test_what_training_would_not_change_is_refused(kind: str, model: Path) -> None:
    if kind == "quantised":
        change(model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    else:
        (model / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/base"}')
    with pytest.raises(ValueError, match=f"^model: .* is {kind} "):
        load_policy(str(model))


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
