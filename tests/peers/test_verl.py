"""Against verl's own fused head, hook and policy losses, on tensors: the same values, metrics and gradients."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if (spec := find_spec("verl")) is None:
    pytest.skip("verl is not installed", allow_module_level=True)

from half import half
from page import shown
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf_kernels.integrations import verl as fused

UTILS = str(Path(next(iter(spec.submodule_search_locations or ())), "utils"))
STUBS = {  # Ray, Hydra and their configs, none of which a loss calls
    "omegaconf": {"DictConfig": dict},
    "tensordict": {"TensorDict": dict},
    "verl.utils": {"__path__": [UTILS], "as_torch_index": None, "group_mean_std": None},
    "verl.workers.config": {"ActorConfig": object},
}
algos = half(
    "verl.trainer.ppo.core_algos",
    ("verl", "verl.utils", "verl.trainer", "verl.trainer.ppo", "verl.workers", "verl.plugin"),
    STUBS,
)
head = half("verl.utils.experimental.torch_functional", ("verl", "verl.utils"))
dense = half("verl.models.transformers.dense_common", ("verl", "verl.utils", "verl.models", "verl.models.transformers"))
EPS = torch.finfo(torch.float32).eps
B, T, H, V = 6, 9, 24, 300


def near(ours: Tensor, theirs: Tensor, times: float = 100) -> None:
    assert theirs.abs().sum() > 0
    assert (ours - theirs).norm() <= times * EPS * theirs.norm(), (ours, theirs)


class Config(SimpleNamespace):
    """What verl's losses read of an actor's config."""

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(V, H) / H**0.5 * 2
    return torch.randn(B, T, H, requires_grad=True), weight.requires_grad_(), torch.randint(0, V, (B, T))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("packed", [False, True])
def test_the_head_is_verls(temperature: float, packed: bool) -> None:
    hidden, weight, ids = problem()
    if packed:
        hidden, ids = hidden.detach().view(-1, H).requires_grad_(), ids.view(-1)
    upstream = torch.randn(2, *ids.shape)
    ours = fused.FusedLinearForPPO()(hidden, weight, ids, temperature)
    theirs = head.FusedLinearForPPO()(hidden, weight, ids, temperature)
    gradients = []
    for logp, entropy in (ours, theirs):
        assert logp.shape == entropy.shape == ids.shape
        loss = (logp * upstream[0] + entropy * upstream[1]).sum()
        gradients.append(torch.autograd.grad(loss, (hidden, weight)))
    for mine, other in zip(ours, theirs, strict=True):
        near(mine.detach(), other.detach())
    for mine, other in zip(*gradients, strict=True):
        near(mine, other)


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_what_the_page_shows_runs() -> None:
    ids = torch.randint(2, V, (2, 7))
    names = {"model": small_model(), "ids": ids, "targets": ids.roll(-1, -1)}
    exec(shown("Coming from verl"), names)
    wanted = dense.forward_with_torch_backend(small_model(), input_ids=ids, temperature=0.7, return_dict=True)
    near(names["output"].log_probs.detach(), wanted.log_probs.detach())


@pytest.mark.parametrize("labels", ["input_ids", "labels", "shift_labels"])
def test_the_hook_is_verls(labels: str) -> None:
    """A model that has been fused answers as one under verl's patch: log-probs, entropies, gradients."""
    model, ids = small_model(), torch.randint(2, V, (2, 7))
    inputs: dict[str, Any] = {"input_ids": ids, "temperature": 0.7, "return_dict": True, "use_cache": False}
    inputs |= {} if labels == "input_ids" else {labels: torch.randint(2, V, (2, 7))}
    theirs = dense.forward_with_torch_backend(model, **inputs)
    plain = model(input_ids=ids).logits
    fused.fuse(model)
    ours = model(**inputs)
    assert torch.equal(model(input_ids=ids).logits, plain)
    near(ours.log_probs.detach(), theirs.log_probs.detach())
    near(ours.entropy.detach(), theirs.entropy.detach())
    upstream, gradients = torch.randn(2, 2, 7), []
    for output in (ours, theirs):
        loss = (output.log_probs * upstream[0] + output.entropy * upstream[1]).sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for mine, other in zip(*gradients, strict=True):
        near(mine, other)


def test_a_softcap_is_not_lost() -> None:
    """verl's hook knows hidden states and a weight only; the model's own logits are the judge here."""
    torch.manual_seed(2)
    config = Gemma2Config(
        vocab_size=V, hidden_size=H, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=12,
        num_key_value_heads=2, final_logit_softcapping=2.0, initializer_range=0.5, attn_implementation="eager",
    )  # fmt: skip
    model, ids = Gemma2ForCausalLM(config), torch.randint(2, V, (2, 7))
    logp = (model(input_ids=ids).logits / 0.7).log_softmax(-1)
    fused.fuse(model)
    output = model(input_ids=ids, temperature=0.7, return_dict=True)
    near(output.log_probs.detach(), logp.gather(-1, ids.roll(-1, -1)[..., None]).squeeze(-1).detach())
    near(output.entropy.detach(), -(logp.exp() * logp).sum(-1).detach())


MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
GLOBAL = {"dp_size": 2, "batch_num_tokens": 41, "global_batch_size": 8, "loss_scale_factor": 13}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["one rank", "two ranks"])
def test_the_policy_loss_is_verls(mode: str, info: dict[str, Any]) -> None:
    hidden, weight, targets = problem()
    mask = torch.arange(T) < torch.tensor([9, 4, 0, 7, 1, 8])[:, None]
    logp = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    old, advantages = (logp + 0.5 * torch.randn(B, T)).detach(), torch.randn(B, T)
    config = Config(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=0.3, clip_ratio_c=1.5, global_batch_info=info)
    common = {"loss_agg_mode": mode, "config": config, "rollout_is_weights": 2 * torch.rand(B, T)}
    ours, said = fused.compute_policy_loss(hidden, weight, targets, old, advantages, mask, **common)
    theirs, told = algos.compute_policy_loss_vanilla(old, logp, advantages, mask.float(), **common)
    near(ours.detach(), theirs.detach())
    for mine, other in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (ours, theirs)), strict=True):
        near(mine, other)
    assert said.keys() == told.keys()
    assert all(0 != said[name] == pytest.approx(value, rel=100 * EPS) for name, value in told.items())


def test_an_unknown_aggregation_is_refused_by_name() -> None:
    hidden, weight, targets = problem()
    config = Config(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, global_batch_info={})
    with pytest.raises(ValueError, match=r"^loss_agg_mode: got 'mean'"):
        fused.compute_policy_loss(hidden, weight, targets, targets, targets, targets, "mean", config)
