"""The folder of a model: nothing in it is run, and it is whole or refused."""

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
from safetensors.torch import load_file
from transformers.integrations import hub_kernels

from tests.support.folders import LAYER, change, reweigh, sft
from tests.support.small import small_policy, write
from trainer.data.chat import ChatTemplate
from trainer.inspect.command import inspect
from trainer.models import files as model_files
from trainer.models.loading import load_policy, load_scalar
from trainer.models.rendering import render_for


@pytest.fixture
def model(tmp_path: Path) -> Path:
    small_policy().save(tmp_path / "model")
    return tmp_path / "model"


# Code


def test_every_call_that_reads_a_model_forbids_its_code() -> None:
    calls = []
    for file in sorted((Path(__file__).parents[3] / "trainer").rglob("*.py")):
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


def test_pitfall_19_code_beside_a_model_is_not_run(path: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(path / "base" / "model", model)
    settings = json.loads((model / "config.json").read_text()) | {"model_type": "of_their_own"}
    settings["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (model / "config.json").write_text(json.dumps(settings))
    (model / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_policy(str(model))
    assert not (tmp_path / "ran").exists()
