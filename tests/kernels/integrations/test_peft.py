"""PEFT: one backbone for policy and reference, LoRA on the head itself, a head of its own per adapter.

In float64, so that a difference is a mistake: values and gradients of the losses through a model that was taken apart
against the model's own logits and log_softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rlhf_kernels as rk

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from rlhf_kernels.integrations.transformers import Parts, take_apart  # noqa: E402
from tests.support import model_families as families  # noqa: E402

IDS = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(3))
TARGETS = IDS[:, 1:].clone().index_fill_(1, torch.tensor([0, 1]), -100)
KEPT = TARGETS != -100
CU = torch.tensor([0, 8, 16], dtype=torch.int32)
CLOSE = 1e-10


@pytest.fixture(autouse=True)
def _quiet():
    with families.quiet():
        yield


def adapted(family: str = "gpt_neox", r: int = 3, **options: Any) -> Any:
    """A tiny model in float64 with LoRA, none of whose weights is zero. Neither family casts to float32 on its way."""
    modules = {"gpt_neox": ["query_key_value", "dense"], "gpt2": ["c_attn", "c_proj"]}[family]
    config = peft.LoraConfig(
        r=r, lora_alpha=5, **{"target_modules": modules, "fan_in_fan_out": family == "gpt2", **options}
    )
    model = peft.get_peft_model(families.build(family).double(), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return model.double()


def plain_logp(model: Any) -> Tensor:
    """[16] of the model's own logits; zero where ignored."""
    logp = model(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    return (logp.gather(-1, TARGETS.clamp(min=0)[..., None])[..., 0] * KEPT).flatten()


def packed(parts: Parts) -> Tensor:
    return parts.hidden_states(input_ids=IDS)[:, :-1].flatten(0, 1)


def our_logp(parts: Parts) -> Tensor:
    return rk.token_stats(packed(parts), parts.weight, TARGETS.flatten(), **parts.options).logp


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, ours: Tensor, plain: Tensor, *, only: str) -> None:
    """Loss and every gradient; gradients reach what trains and nothing else, and none of them is zero."""
    assert abs(ours - plain).item() <= CLOSE * max(1, abs(plain.item()))
    right, got = gradients(model, plain), gradients(model, ours)
    assert right.keys() == got.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, x in right.items():
        assert any(word in name for word in only.split()), name
        assert x.norm() > 1e-9, f"the gradient of {name} is too small to tell anything"
        assert (got[name] - x).norm() <= CLOSE * x.norm(), name


def ppo(parts: Parts, logp: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    old = logp().detach() + 0.3 * torch.randn(16, generator=g, dtype=torch.float64)
    advantages = torch.randn(16, generator=g, dtype=torch.float64)
    ours = rk.ppo_loss(packed(parts), parts.weight, TARGETS.flatten(), old, advantages, **parts.options).loss
    ratio = (logp() - old).exp()
    worst = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return ours, -worst[KEPT.flatten()].mean()


def dpo(parts: Parts, logp: Callable[[], Tensor], ref: Tensor) -> tuple[Tensor, Tensor]:
    ours = rk.dpo_loss(packed(parts), parts.weight, TARGETS.flatten(), CU, ref, beta=0.3, **parts.options).loss
    ratio = (logp() - ref).view(2, 8).sum(1)
    return ours, -nn.functional.logsigmoid(0.3 * (ratio[0] - ratio[1]))


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])  # the head of one is its own, of the other the embedding
def test_one_backbone_for_policy_and_reference(family: str):
    """The reference is the policy with its adapter off; only the adapter has gradients, and they are the right ones."""
    model = adapted(family)
    parts = take_apart(model)
    with torch.no_grad(), model.disable_adapter():
        ref, theirs = our_logp(parts), plain_logp(model)
    assert (ref - theirs).abs().max() <= CLOSE
    assert (ref - our_logp(parts)).abs().max() > 0.01, "the adapter does nothing"
    with model.disable_adapter():
        assert parts.weight is model.get_base_model().get_output_embeddings().weight
    assert_same(model, *ppo(parts, lambda: plain_logp(model)), only="lora_")
    assert_same(model, *dpo(parts, lambda: plain_logp(model), ref), only="lora_")


def test_exact_kl_to_the_adapter_switched_off():
    model = adapted()
    parts = take_apart(model)
    with torch.no_grad(), model.disable_adapter():
        ref = packed(parts), parts.weight
    kl = rk.kl_divergence(packed(parts), parts.weight, *ref, TARGETS.flatten()).sum()
    with torch.no_grad(), model.disable_adapter():
        q = model(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    p = model(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    assert_same(model, kl, (p.exp() * (p - q)).sum(-1)[KEPT].sum(), only="lora_")


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=["plain", "rslora", "bias"])
def test_lora_on_the_head_itself(options: dict[str, Any]):
    """Its weight is W + B A, and W with the adapter off."""
    model = adapted(target_modules=["query_key_value", "embed_out", "lm_head"], **options)
    assert any("lm_head.lora_A" in n or "embed_out.lora_A" in n for n, _ in model.named_parameters())
    parts = take_apart(model)
    base = model.get_base_model().get_output_embeddings().base_layer.weight
    with torch.no_grad(), model.disable_adapter():
        ref = our_logp(parts)
        assert parts.weight is base
        assert (ref - plain_logp(model)).abs().max() <= CLOSE
    assert (parts.weight - base).norm() > 0.01 * base.norm()
    assert_same(model, *ppo(parts, lambda: plain_logp(model)), only="lora_")
    assert_same(model, *dpo(parts, lambda: plain_logp(model), ref), only="lora_")


def test_merged_adapters_and_trained_ones_are_seen():
    model = adapted(target_modules=["query_key_value", "embed_out", "lm_head"])
    parts = take_apart(model)
    before = our_logp(parts).detach()
    model.merge_adapter()
    assert parts.weight is model.get_base_model().get_output_embeddings().base_layer.weight
    assert (our_logp(parts) - before).abs().max() <= CLOSE
    with model.disable_adapter(), pytest.raises(ValueError, match=r"wants unmerge_adapter\(\) first"):
        _ = parts.weight
    model.unmerge_adapter()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(2)
    assert (our_logp(parts) - plain_logp(model)).abs().max() <= CLOSE
    assert (our_logp(parts) - before).abs().max() > 0.01


def test_two_adapters_on_the_head():
    model = adapted(target_modules=["embed_out", "lm_head"])
    head = model.get_base_model().get_output_embeddings()
    name = next(n for n, m in model.get_base_model().named_modules() if m is head)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=[name], init_lora_weights=False))
    model.double()
    parts = take_apart(model)
    each = []
    for adapters in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(adapters)
        each.append(our_logp(parts))
        assert (each[-1] - plain_logp(model)).abs().max() <= CLOSE, adapters
    assert min((each[i] - each[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.01


def test_a_head_of_its_own_per_adapter():
    """With ``modules_to_save`` the adapter has a whole head, and the reference has the old one."""
    model = adapted(modules_to_save=["embed_out", "lm_head"])
    parts = take_apart(model)
    with torch.no_grad(), model.disable_adapter():
        ref, old = our_logp(parts), parts.weight
        assert (ref - plain_logp(model)).abs().max() <= CLOSE
    assert parts.weight is not old
    assert parts.weight.requires_grad
    assert not old.requires_grad
    assert_same(model, *ppo(parts, lambda: plain_logp(model)), only="lora_ modules_to_save")
    assert_same(model, *dpo(parts, lambda: plain_logp(model), ref), only="lora_ modules_to_save")


def test_a_value_head_on_the_same_backbone():
    """A policy, its reference and its values by one backbone: a linear layer on the hidden states of one adapter."""
    model = adapted()
    parts = take_apart(model)
    value = nn.Linear(32, 1).double()
    hidden = packed(parts)
    returns = torch.linspace(-1, 1, 16, dtype=torch.float64)
    policy = rk.sft_loss(hidden, parts.weight, TARGETS.flatten(), **parts.options).loss
    loss = policy + rk.value_loss(value(hidden)[:, 0], returns, mask=KEPT.flatten()).loss
    states = model.get_base_model().base_model(input_ids=IDS).last_hidden_state[:, :-1].flatten(0, 1)
    v = value(states)[:, 0][KEPT.flatten()]
    plain = -plain_logp(model).sum() / KEPT.sum() + 0.5 * (v - returns[KEPT.flatten()]).square().mean()
    assert_same(model, loss, plain, only="lora_")


def test_scores_under_peft():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "eos_token_id": 1}
    config = transformers.GPTNeoXConfig(**sizes, num_attention_heads=4, num_labels=1, pad_token_id=0)
    model = transformers.GPTNeoXForSequenceClassification(config).eval()
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query_key_value"]))
    parts = take_apart(model)
    assert parts.weight.requires_grad
    scores = parts.logits(parts.hidden_states(input_ids=IDS))
    assert torch.allclose(scores[:, -1], model(input_ids=IDS).logits, rtol=1e-5, atol=1e-7)


REFUSED = {
    "dora": ({"use_dora": True}, "more than W"),
    "dropout": ({"lora_dropout": 0.1}, "more than W"),
    "another tuner": (None, "its head is a peft.tuners"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_on_the_head_by_name(what: str):
    options, why = REFUSED[what]
    if options is not None:
        model = adapted(target_modules=["embed_out", "lm_head"], **options)
    else:
        config = peft.IA3Config(target_modules=["embed_out", "lm_head"], feedforward_modules=[])
        model = peft.get_peft_model(families.build("gpt_neox"), config)
    with pytest.raises(ValueError, match=f"model: GPTNeoXForCausalLM cannot be taken apart: .*{why}"):
        take_apart(model)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.1}], ids=["dora", "dropout"])
def test_anything_goes_in_the_backbone(options: dict[str, Any]):
    model = adapted(**options).eval()
    parts = take_apart(model)
    assert (our_logp(parts) - plain_logp(model)).abs().max() <= CLOSE


def test_tokens_that_nobody_gave_are_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(families.build("gpt_neox"), config)
    with pytest.raises(ValueError, match=r"its head reads \[2, 12, 32\], wants a row for each of \[2, 8\] tokens"):
        take_apart(model)


def test_the_example_of_the_docs_runs():
    code = families.DOC.read_text().partition("```python\nparts = take_apart(peft_model)\n")[2].partition("```")[0]
    model = adapted()
    given = {"torch": torch, "rk": rk, "peft_model": model, "ids": IDS, "targets": TARGETS, "cu_seqlens": CU}
    exec(code, given | {"parts": take_apart(model)})
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
