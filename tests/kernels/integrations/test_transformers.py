"""A model of transformers, taken apart: what it leaves as it was, score heads, and what is refused by name."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from rlhf_kernels.integrations.transformers import take_apart  # noqa: E402
from tests.support import model_families as families  # noqa: E402

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(3))


def made(kind: str, **more: Any) -> Any:
    """A tiny model by the name of its class, in eval mode."""
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**{**SIZES, "eos_token_id": 1, "pad_token_id": 0, **more})).eval()


@pytest.fixture(autouse=True)
def _quiet():
    with families.quiet():
        yield


def test_no_logits_are_made():
    parts = take_apart(made("LlamaForCausalLM"))
    rows = []
    parts.head.register_forward_hook(lambda m, i, o: rows.append(o.shape[1]))
    assert parts.hidden_states(input_ids=IDS).shape == (2, 9, 32)
    assert rows == [0]


def test_a_mask_and_embeddings_pass_through():
    model = made("LlamaForCausalLM")
    parts, mask = take_apart(model), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    inputs = {"inputs_embeds": model.get_input_embeddings()(IDS), "attention_mask": mask}
    own = model(**inputs).logits
    assert torch.allclose(parts.logits(parts.hidden_states(**inputs)), own, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(parts.logits(parts.hidden_states(input_ids=IDS)), own, rtol=1e-2, atol=1e-3)


def test_the_model_is_left_as_it_was():
    model = made("LlamaForCausalLM").train()
    model.model.layers[0].eval()
    hooks = lambda: [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]  # noqa: E731
    before = {name: m.training for name, m in model.named_modules()}
    take_apart(model).hidden_states(input_ids=IDS)
    assert {name: m.training for name, m in model.named_modules()} == before
    assert hooks() == []
    assert all(p.grad is None for p in model.parameters())


def test_parts_follow_the_model():
    """Nothing is copied, so that an optimizer's step or a resized vocabulary is seen."""
    model = made("PhiForCausalLM")
    parts = take_apart(model)
    assert parts.weight is model.lm_head.weight
    with torch.no_grad():
        model.lm_head.bias += 1
    assert parts.options["bias"] is model.lm_head.bias


SCORES = ["LlamaForSequenceClassification", "LlamaForTokenClassification", "GPT2ForTokenClassification"]


@pytest.mark.parametrize("kind", SCORES)
def test_score_heads(kind: str):
    model = made(kind, num_labels=1)
    parts = take_apart(model)
    assert parts.scores
    assert parts.plain
    assert parts.weight.shape == (1, 32)
    scores = parts.logits(parts.hidden_states(input_ids=IDS))[..., 0]
    own = model(input_ids=IDS).logits[..., 0]
    assert torch.allclose(own, scores[:, -1] if own.dim() == 1 else scores, rtol=1e-5, atol=1e-7)


def test_padding_is_not_among_what_is_tried():
    take_apart(made("LlamaForSequenceClassification", num_labels=1, pad_token_id=9))


def test_dropout_is_off_while_it_is_tried():
    take_apart(made("LlamaForCausalLM", attention_dropout=0.5).train())


def test_a_head_that_was_replaced_is_noticed():
    model = made("LlamaForCausalLM")
    parts = take_apart(model)
    model.lm_head = nn.Linear(32, 64)
    with pytest.raises(ValueError, match="its head was not called; take it apart anew"):
        parts.hidden_states(input_ids=IDS)


class Int8(nn.Module):
    """Stands for a quantised layer."""

    def __init__(self, of: nn.Linear):
        super().__init__()
        self.scale = of.weight.abs().max().item() / 127
        self.register_buffer("weight", (of.weight / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def test_a_quantised_backbone_is_welcome():
    model = made("LlamaForCausalLM")
    for layer in model.model.layers:
        layer.mlp.down_proj = Int8(layer.mlp.down_proj)
    parts = take_apart(model)
    own = model(input_ids=IDS).logits
    assert torch.allclose(parts.logits(parts.hidden_states(input_ids=IDS)), own, rtol=1e-5, atol=1e-6)


def test_a_head_of_bitsandbytes_is_refused():
    bnb = pytest.importorskip("bitsandbytes")
    model = made("LlamaForCausalLM")
    model.lm_head = bnb.nn.Linear8bitLt(32, 64, bias=False)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be taken apart: its head is a bitsandbytes"):
        take_apart(model)


class Odd(transformers.LlamaForCausalLM):
    """Does something to its logits that no config tells."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        out = super().forward(*args, **inputs)
        out.logits = self.odd(out.logits)
        return out


def masked(z: Tensor) -> Tensor:
    return z.index_fill(-1, torch.tensor([7]), -1e9)


ODD = {
    "a scale": lambda z: 1.01 * z,
    "a cap": lambda z: 50 * torch.tanh(z / 50),
    "a cap that is rounded away where logits are small": lambda z: (50 * torch.tanh(z / 50)).bfloat16(),
    "small numbers set to zero": lambda z: z.where(z.abs() > 0.5, 0).bfloat16(),
    "a column that is masked": masked,
    "a shift": lambda z: z + 0.5,
    "columns that change places": lambda z: z.roll(1, -1),
    "rows that change places": lambda z: z.flip(0),
    "log-probabilities": lambda z: z.log_softmax(-1),
}


@pytest.mark.parametrize("what", ODD)
def test_unknown_work_on_logits_is_refused(what: str):
    model = Odd(made("LlamaForCausalLM").config).eval()
    model.odd = ODD[what]
    with pytest.raises(ValueError, match="Odd cannot be taken apart: its logits are not softcap"):
        take_apart(model)
    model.odd = lambda z: z
    take_apart(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_tried_as_sharply(dtype: torch.dtype):
    model = Odd(made("LlamaForCausalLM").config).eval().to(dtype)
    model.odd = lambda z: z
    assert take_apart(model).weight.dtype == dtype
    model.odd = ODD["a scale"]
    with pytest.raises(ValueError, match="its logits are not softcap"):
        take_apart(model)


def changed(change: Any, kind: str = "LlamaForCausalLM", **more: Any) -> Any:
    model = made(kind, **more)
    return change(model) or model


def int8_head(model: Any) -> None:
    model.lm_head = Int8(model.lm_head)


def int8_weight(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)


def meta_head(model: Any) -> None:
    model.lm_head.to("meta")


def gathered_head(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda m, i, o: torch.cat([o, o], -1))


def bent_head(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda m, i, o: o + 1e-3)


def called_twice(model: Any) -> None:
    model.model.register_forward_hook(lambda m, i, o: (model.lm_head(o.last_hidden_state), o)[1])


def noisy(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda m, i, o: o + torch.rand_like(o))


def rounded(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda m, i, o: o.bfloat16())
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)


def as_it_is(model: Any) -> None:
    pass


REFUSED = {
    "a head of another kind": (
        int8_head,
        "LlamaForCausalLM",
        {},
        r"its head is a .*Int8, wants a plain torch.nn.Linear",
    ),
    "a weight in int8": (int8_weight, "LlamaForCausalLM", {}, r"quantised \(Parameter, torch.int8\)"),
    "a weight on meta": (meta_head, "LlamaForCausalLM", {}, "the weight of its head is not here"),
    "a head that gathers": (gathered_head, "LlamaForCausalLM", {}, "its head says something else"),
    "a head with more to it": (bent_head, "LlamaForCausalLM", {}, "its head says something else"),
    "a head called twice": (called_twice, "LlamaForCausalLM", {}, "its head is called 2 times"),
    "autocast": (rounded, "LlamaForCausalLM", {}, "its head has torch.float32 and reads torch.bfloat16"),
    "noise": (noisy, "LlamaForCausalLM", {}, "two forwards of the same tokens"),
    "a pooled score": (
        as_it_is,
        "BertForSequenceClassification",
        {"num_labels": 1},
        r"its head reads \[1, 32\], wants a row",
    ),
    "three labels": (as_it_is, "LlamaForSequenceClassification", {"num_labels": 3}, "0 layers with one output"),
    "no head": (as_it_is, "LlamaModel", {}, "0 layers with one output"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str):
    change, kind, more, why = REFUSED[what]
    with pytest.raises(ValueError, match=f"^model: {kind} cannot be taken apart: .*{why}"):
        take_apart(changed(change, kind, **more))


def test_refused_arguments():
    with pytest.raises(TypeError, match="model: got Linear, wants a model of transformers"):
        take_apart(nn.Linear(2, 2))
    parts = take_apart(made("LlamaForCausalLM"))
    with pytest.raises(ValueError, match="labels: got one"):
        parts.hidden_states(input_ids=IDS, labels=IDS)
    with pytest.raises(ValueError, match="logits_to_keep: got one"):
        parts.hidden_states(input_ids=IDS, logits_to_keep=1)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metadata, "version", lambda name: "6.0.1")
    with pytest.raises(ImportError, match=r"transformers: got version 6.0.1, wants >=5.17,<6"):
        take_apart(made("LlamaForCausalLM"))


def test_nothing_is_imported_before_it_is_needed():
    code = """if True:
        import sys, rlhf_kernels, rlhf_kernels.integrations, rlhf_kernels.integrations.transformers
        assert not {"transformers", "peft"} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", code], check=True)
