"""PPO, GRPO and DPO on two ranks under DeepSpeed's ZeRO-3 take the steps that one process takes."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if importlib.util.find_spec("deepspeed") is None:  # importing it would change this process, and take seconds
    pytest.skip("deepspeed is not installed", allow_module_level=True)

import rlhf_kernels as rk
from rlhf_kernels.integrations.distributed import InForward, summed
from rlhf_kernels.integrations.transformers import take_apart
from tests.kernels.integrations.test_distributed import LENGTHS, LOSSES, Documented, Tiny, V, batch, step
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.slow
STEPS, LR = 2, 1.0
CASES = [
    (loss, case, tied) for loss in LOSSES for case in LENGTHS for tied in (False, True) if loss == "ppo" or not tied
]
CONFIG = {
    "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}  # fmt: skip


def on_cpu() -> Any:
    """DeepSpeed without a launcher, and without the extension that it would compile to exchange data."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def sharded(model: nn.Module, compute: Callable[..., Any]) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    return on_cpu().initialize(model=InForward(model, compute), optimizer=optimizer, config=CONFIG)[0]


def trained(model: nn.Module, compute: Callable[..., Any], *given: Any) -> list[dict[str, Any]]:
    """Loss, gradients and weights of each step; nobody holds a whole weight between steps."""
    engine, found = sharded(model, compute), []
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    for _ in range(STEPS):
        out = engine(*given)
        engine.backward(out.loss * 2)
        grads = {name: safe_get_full_grad(p).clone() for name, p in model.named_parameters()}
        engine.step()
        weights = {name: safe_get_full_fp32_param(p).clone() for name, p in model.named_parameters()}
        held = {name: p.numel() for name, p in model.named_parameters()}
        found.append({"loss": out.loss.detach(), "grads": grads, "weights": weights, "held": held})
    engine.destroy()
    return found


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, initializer_range=0.2, **sizes))


def padded(rank: int) -> tuple[Tensor, Tensor]:
    """Ids and targets of two sequences: of six tokens on rank 0, of nine on rank 1."""
    ids = torch.randint(V, (2, 6 + 3 * rank), generator=torch.Generator().manual_seed(rank))
    return ids, ids[:, 1:].masked_fill(ids[:, 1:] % 3 == 0, -100)


def demonstrated(parts: Any) -> Callable[..., rk.LossOutput]:
    def compute(model: nn.Module, ids: Tensor, targets: Tensor, num_tokens: int) -> rk.LossOutput:
        hidden = parts.hidden_states(input_ids=ids)[:, :-1]
        return rk.sft_loss(hidden, parts.weight, targets, num_tokens=num_tokens, **parts.options)

    return compute


def taken_apart(rank: int) -> list[dict[str, Any]]:
    model = llama()
    ids, targets = padded(rank)
    (num_tokens,) = summed((targets != -100).sum())
    return trained(model, demonstrated(take_apart(model)), ids, targets, num_tokens)


def shown(rank: int) -> tuple[Tensor, str]:
    """What docs/distributed.md does, on a batch of this rank: the loss, and what is said of a head read outside."""
    text = Path(__file__).parents[2].joinpath("docs/distributed.md").read_text()
    first, *_ = blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    (ours,) = (block for block in blocks if "deepspeed" in block)
    model, b = Documented(), batch("ragged", [rank])
    names = {
        "model": model, "batch": b | {"input_ids": b["ids"]}, "config": CONFIG, "world_size": 2, "deepspeed": on_cpu(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=LR), "num_tokens": summed((b["targets"] != -100).sum())[0],
    }  # fmt: skip
    exec(first.split("module = ")[0] + ours, names)
    try:
        rk.sft_loss(torch.zeros(len(b["targets"]), 16), model.lm_head.weight, b["targets"])
    except ValueError as error:
        return names["out"].loss.detach(), str(error)
    raise AssertionError("a head was read where there is none")


def everything(rank: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {"llama": taken_apart(rank), "shown": shown(rank)}
    for loss, case, tied in CASES:
        b = batch(case, [rank])
        counts = summed((b["targets"] != -100).sum(), b["cu_seqlens"].numel() - 1)
        found[loss, case, tied] = trained(Tiny(tied), step, b, loss, *counts)
    return found


def one_process(model: nn.Module, loss_of: Callable[[], Tensor]) -> list[dict[str, Any]]:
    found = []
    for _ in range(STEPS):
        loss = loss_of()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        names = [name for name, _ in model.named_parameters()]
        with torch.no_grad():
            for p, grad in zip(model.parameters(), grads, strict=True):
                p -= LR * grad
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        found.append({"loss": loss.detach(), "grads": dict(zip(names, grads, strict=True)), "weights": weights})
    return found


def the_same(name: Any, ranks: list[dict[Any, Any]], alone: list[dict[str, Any]], exact: list[dict[str, Any]]) -> None:
    """Within 1e-6 of the norm of each gradient and weight, and twice what float32 costs one process."""
    for a, b, want, true in zip(*(rank[name] for rank in ranks), alone, exact, strict=True):
        assert set(a["held"].values()) == {0}, "nothing was sharded"
        torch.testing.assert_close(a["loss"] + b["loss"], want["loss"], rtol=1e-6, atol=1e-6)
        for kind in ("grads", "weights"):
            assert a[kind].keys() == want[kind].keys()
            for p, right in want[kind].items():
                assert torch.equal(a[kind][p], b[kind][p]), (name, kind, p)
                allowed = 1e-6 * float(right.norm()) + 2 * float((right - true[kind][p]).norm())
                assert float((a[kind][p] - right).norm()) <= allowed, (name, kind, p)
    assert all(float(x.norm()) > 0 for x in alone[0]["grads"].values())


def test_two_ranks_take_the_steps_of_one_process():
    """One test, because starting DeepSpeed is what takes the time."""
    ranks = on_ranks(2, everything, seconds=150)  # beside other tests, importing deepspeed alone takes long
    for loss, case, tied in CASES:
        model, b = Tiny(tied), batch(case, [0, 1])
        counts = int((b["targets"] != -100).sum()), b["cu_seqlens"].numel() - 1
        alone = one_process(model, lambda: step(model, b, loss, *counts).loss)  # noqa: B023
        the_same((loss, case, tied), ranks, alone, alone)

    batches = [padded(rank) for rank in range(2)]
    num_tokens = sum(int((targets != -100).sum()) for _, targets in batches)

    def llama_alone(model: nn.Module) -> list[dict[str, Any]]:
        compute = demonstrated(take_apart(model))
        return one_process(model, lambda: sum(compute(model, *b, num_tokens).loss for b in batches))

    the_same("llama", ranks, llama_alone(llama()), llama_alone(llama().double()))

    model, b = Tiny(False), batch("ragged", [0, 1])
    given = (model.hidden(b["ids"]), model.lm_head.weight, b["targets"], b["old_logp"], b["advantages"])
    whole = sum(rank["shown"][0] for rank in ranks)
    torch.testing.assert_close(whole, rk.ppo_loss(*given).loss.detach(), rtol=1e-6, atol=1e-6)
    assert all(rank["shown"][1].startswith("weight: got float32[0] on cpu") for rank in ranks), ranks[0]["shown"]
