"""Against OpenRLHF's own actor and losses, on tensors: the same values, metrics and gradients."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

if find_spec("openrlhf") is None:
    pytest.skip("openrlhf is not installed", allow_module_level=True)

from half import half
from page import shown
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_kernels.integrations import openrlhf as fused

BARE = ("openrlhf", "openrlhf.models")
STUBS = {  # of modules that want a GPU to be imported, and are not called here
    "deepspeed": {},
    "openrlhf.models.ring_attn_utils": {"gather_and_pad_tensor": None, "unpad_and_slice_tensor": None},
}
losses = half("openrlhf.models.loss", BARE, STUBS)
EPS = torch.finfo(torch.float32).eps
B, T, H, V = 6, 9, 24, 300


class Batch:
    """Hidden states, a head and what a rollout would have left, with one sequence that is all padding."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.hidden = torch.randn(B, T, H, requires_grad=True)
        self.weight = torch.nn.Parameter(torch.randn(V, H) / H**0.5 * 2)
        self.targets = torch.randint(0, V, (B, T))
        self.mask = torch.arange(T) < torch.tensor([9, 4, 0, 7, 1, 8])[:, None]
        self.advantages = torch.randn(B, T)
        self.old = (self.logp() + 0.5 * torch.randn(B, T)).detach()

    def logp(self) -> Tensor:
        logits = self.hidden @ self.weight.T
        return logits.log_softmax(-1).gather(-1, self.targets[..., None]).squeeze(-1)

    def grads(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        return torch.autograd.grad(loss, (self.hidden, self.weight))


def near(ours: Tensor, theirs: Tensor, times: float = 100) -> None:
    assert theirs.abs().sum() > 0
    assert (ours - theirs).norm() <= times * EPS * theirs.norm(), (ours, theirs)


def same_gradients(batch: Batch, ours: Tensor, theirs: Tensor) -> None:
    near(ours.detach(), theirs.detach())
    for a, b in zip(batch.grads(ours), batch.grads(theirs), strict=True):
        near(a, b)


@pytest.mark.parametrize("of_batch", [{}, {"batch_num_tokens": 41.0, "global_batch_size": 8.0, "dp_size": 2}])
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("dual_clip", [None, 1.3])
def test_policy_loss(of_batch: dict[str, Any], token_level: bool, dual_clip: float | None) -> None:
    batch = Batch()
    options = {"clip_eps_low": 0.1, "clip_eps_high": 0.3, "dual_clip": dual_clip, "token_level_loss": token_level}
    rest = (batch.old, batch.advantages, batch.mask.float())
    ours = fused.PolicyLoss(**options)(batch.hidden, batch.weight, batch.targets, *rest, **of_batch)
    theirs = losses.PolicyLoss(**options)(batch.logp(), *rest, **of_batch)
    same_gradients(batch, ours[0], theirs[0])
    assert ours[3:] == theirs[3:] == (None, None)
    assert 0.1 < theirs[1] < 0.9
    near(ours[1], theirs[1])
    near(ours[2], theirs[2])


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"ipo": True}], ids=["dpo", "smoothed", "ipo"])
def test_dpo_loss(options: dict[str, Any]) -> None:
    batch = Batch()
    targets = batch.targets.masked_fill(~batch.mask, -100)
    reference = (batch.old * batch.mask).sum(-1).chunk(2)
    ours = fused.DPOLoss(0.3, **options)(batch.hidden, batch.weight, targets, *reference)
    policy = (batch.logp() * batch.mask).sum(-1).chunk(2)
    theirs = losses.DPOLoss(0.3, **options)(*policy, *reference)
    same_gradients(batch, ours[0], theirs[0])
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        near(a, b)


def test_head_options_reach_the_head() -> None:
    batch = Batch()
    rest = (batch.old, batch.advantages, batch.mask.float())
    args = (batch.hidden, batch.weight, batch.targets)
    cool = fused.PolicyLoss()(*args, *rest, temperature=0.5)[0]
    near(cool, fused.PolicyLoss()(2 * batch.hidden, *args[1:], *rest)[0])
    assert (cool - fused.PolicyLoss()(*args, *rest)[0]).abs() > 1e-3


@pytest.mark.parametrize("name", ["policy_loss_type", "is_correction_level"])
def test_what_is_not_served_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got 'token'"):
        fused.PolicyLoss(**{name: "token"})


def small_actor(temperature: float) -> Any:
    actor = pytest.importorskip("peft") and half("openrlhf.models.actor", BARE, STUBS)
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=V, n_embd=H, n_layer=1, n_head=2, n_positions=32, initializer_range=0.3, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
    )  # fmt: skip  # learned positions: rotary ones would not notice a shift
    made = actor.Actor(GPT2LMHeadModel(config), temperature=temperature)
    made.packing_samples = False
    return made


def test_action_log_probs_are_the_actors() -> None:
    """Prompts padded on the left, replies on the right, a temperature, and the gradients of every parameter."""
    actor = small_actor(0.7)
    sequences = torch.randint(2, V, (4, 11))
    attention_mask = torch.ones_like(sequences)
    attention_mask[0, :3] = 0
    attention_mask[1, 9:] = 0
    action_mask = attention_mask[:, 5:].clone()
    action_mask[2, 2] = 0
    weights = torch.randn(2, 4, 6)
    with torch.compiler.set_stance("force_eager"):
        theirs, output = actor(sequences, action_mask, attention_mask, return_output=True, return_entropy=True)
    ours, entropy = fused.action_log_probs(actor, sequences, action_mask, attention_mask)
    entropy_of_theirs = output.entropy[:, -6:] * action_mask
    near(ours.detach(), theirs.detach())
    near(entropy.detach(), entropy_of_theirs.detach())
    parameters = list(actor.parameters())
    a = torch.autograd.grad((ours * weights[0] + entropy * weights[1]).sum(), parameters)
    b = torch.autograd.grad((theirs * weights[0] + entropy_of_theirs * weights[1]).sum(), parameters)
    for mine, other in zip(a, b, strict=True):
        near(mine, other)
    names = {"actor": actor, "sequences": sequences, "action_mask": action_mask, "attention_mask": attention_mask}
    names |= {"old_log_probs": theirs.detach(), "advantages": weights[0], "policy_loss": losses.PolicyLoss()}
    exec(shown("Coming from OpenRLHF"), names)
    near(names["loss"].detach(), losses.PolicyLoss()(theirs, theirs, weights[0], action_mask)[0].detach())


def test_packed_samples_are_refused() -> None:
    actor = small_actor(1.0)
    actor.packing_samples = True
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^packing_samples: got True"):
        fused.action_log_probs(actor, ids, ids[:, 1:], ids)
