"""PPO, GRPO and DPO on two ranks under DDP and FSDP2 give what one process gives, whatever the ranks have to do."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rlhf_kernels as rk
from rlhf_kernels.integrations.distributed import InForward, gathered, summed
from tests.support.ranks import on_ranks

H, V = 16, 61
LENGTHS = {"ragged": ([3, 9, 2, 5], [8, 1]), "nothing on the second": ([4, 6], [3, 3])}  # of each rank's sequences
ENGINES, LOSSES = ("ddp", "fsdp2"), ("ppo", "grpo", "dpo")


class Tiny(nn.Module):
    """Token embedding, two layers, and a head, tied or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, H)
        self.layers = nn.ModuleList([nn.Linear(H, H), nn.Linear(H, H)])
        self.lm_head = nn.Linear(H, V, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def step(model: Tiny, b: dict[str, Tensor], loss: str, num_tokens: int, num_sequences: int) -> rk.LossOutput:
    head = (model.hidden(b["ids"]), model.lm_head.weight, b["targets"])
    if loss == "ppo":
        return rk.ppo_loss(*head, b["old_logp"], b["advantages"], entropy_coef=0.01, num_tokens=num_tokens)
    if loss == "grpo":
        return rk.grpo_loss(
            *head, b["old_logp"], b["advantages"], cu_seqlens=b["cu_seqlens"], reduction="sequence_mean",
            num_sequences=num_sequences,
        )  # fmt: skip
    return rk.dpo_loss(
        *head, b["cu_seqlens"], b["old_logp"].new_zeros(()).expand(len(b["old_logp"])), num_pairs=num_sequences // 2
    )


def batch(case: str, ranks: list[int]) -> dict[str, Tensor]:
    """The sequences of these ranks, packed."""
    parts: dict[str, list[Tensor]] = {name: [] for name in ("ids", "targets", "old_logp", "advantages", "lengths")}
    for rank in ranks:
        rng = torch.Generator().manual_seed(7 + rank)
        lengths = LENGTHS[case][rank]
        n = sum(lengths)
        targets = torch.randint(V, (n,), generator=rng)
        targets[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = -100
        if case.startswith("nothing") and rank == 1:
            targets.fill_(-100)
        parts["ids"].append(torch.randint(V, (n,), generator=rng))
        parts["targets"].append(targets)
        parts["old_logp"].append(-4 - torch.rand(n, generator=rng))
        parts["advantages"].append(torch.randn(n, generator=rng))
        parts["lengths"].append(torch.tensor(lengths))
    found = {name: torch.cat(x) for name, x in parts.items()}
    cu = F.pad(found.pop("lengths").cumsum(0), (1, 0))
    return found | {"cu_seqlens": cu}


def under(engine: str, model: Tiny, compute: Any) -> nn.Module:
    module = InForward(model, compute)
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(module)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def every_case(rank: int) -> dict[tuple, dict[str, Tensor]]:
    found = {}
    for engine in ENGINES:
        for loss in LOSSES:
            for case in LENGTHS:
                for tied in (False, True):
                    model, b = Tiny(tied), batch(case, [rank])
                    counts = summed((b["targets"] != -100).sum(), b["cu_seqlens"].numel() - 1)
                    module = under(engine, model, step)
                    out = module(b, loss, *counts)
                    (out.loss * 2).backward()
                    grads = {n: _full(p.grad) for n, p in model.named_parameters()}
                    found[engine, loss, case, tied] = {"loss": out.loss.detach()} | grads
    return found


def spread_both_ways(rank: int) -> dict[str, Tensor]:
    """A head spread by rows, hidden states by tokens."""
    model, b = Tiny(False), batch("ragged", [0, 1])
    rows, columns = len(b["ids"]) // 2, -(-V // 2)
    group = torch.distributed.group.WORLD
    hidden = model.hidden(b["ids"]).detach()[rank * rows : (rank + 1) * rows].requires_grad_()
    weight = model.lm_head.weight.detach()[rank * columns : (rank + 1) * columns].requires_grad_()
    spread = {"tp_group": group, "vocab_size": V}
    out = rk.ppo_loss(gathered(hidden, group), weight, b["targets"], b["old_logp"], b["advantages"], **spread)
    out.loss.backward()
    return {"loss": out.loss.detach(), "hidden": hidden.grad, "weight": weight.grad}


class Documented(nn.Module):
    """What the documents call a model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Tiny(False)
        self.model.forward = lambda ids: SimpleNamespace(last_hidden_state=self.model.hidden(ids))
        self.lm_head = self.model.lm_head


def run_documented(rank: int, blocks: list[str]) -> tuple[float, float]:
    from torch.distributed.fsdp import fully_shard

    b, columns = batch("ragged", [0]), 151936
    names = {
        "model": Documented(), "batch": b | {"input_ids": b["ids"]}, "fully_shard": fully_shard, "world_size": 1,
        "hidden": torch.randn(len(b["ids"]), 4), "my_rows_of_weight": torch.randn(columns, 4),
        "group": torch.distributed.group.WORLD, **{k: b[k] for k in ("targets", "old_logp", "advantages")},
    }  # fmt: skip
    found = []
    for block in blocks:
        exec(block, names)
        found.append(float(names["out"].loss))
    return tuple(found)


def _full(x: Any) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


@pytest.fixture(scope="module")
def found():
    return on_ranks(2, every_case)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_give_what_one_process_gives(found, engine, loss, case, tied):
    model, b = Tiny(tied), batch(case, [0, 1])
    out = step(model, b, loss, int((b["targets"] != -100).sum()), b["cu_seqlens"].numel() - 1)
    out.loss.backward()
    first, second = (rank[engine, loss, case, tied] for rank in found)
    torch.testing.assert_close(first["loss"] + second["loss"], out.loss.detach(), rtol=1e-6, atol=1e-6)
    for name, p in model.named_parameters():
        assert torch.equal(first[name], second[name]), name
        assert float((first[name] - p.grad).norm()) <= 1e-6 * max(1.0, float(p.grad.norm())), name


def test_hidden_states_may_be_spread_by_tokens():
    model, b = Tiny(False), batch("ragged", [0, 1])
    hidden = model.hidden(b["ids"]).detach().requires_grad_()
    out = rk.ppo_loss(hidden, model.lm_head.weight, b["targets"], b["old_logp"], b["advantages"])
    out.loss.backward()
    first, second = on_ranks(2, spread_both_ways)
    for part in (first, second):
        torch.testing.assert_close(part["loss"], out.loss.detach(), rtol=1e-6, atol=1e-6)
    for name, right in (("hidden", hidden.grad), ("weight", model.lm_head.weight.grad)):
        got = torch.cat([first[name], second[name]])
        assert float((got - right).norm()) <= 1e-6 * float(right.norm()), name


def test_what_the_document_shows_runs():
    text = Path(__file__).parents[3].joinpath("docs/distributed.md").read_text()
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "deepspeed" not in block]
    assert len(blocks) == 2  # and another in tests/peers/test_deepspeed.py
    (losses,) = on_ranks(1, run_documented, blocks)
    assert all(abs(x) < 100 for x in losses)
