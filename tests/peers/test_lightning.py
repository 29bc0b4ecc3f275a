"""The module of docs/integrations.md under Lightning's trainer, beside a loop with neither Lightning nor our head."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning", reason="lightning is not installed")

import lightning
from page import defined, shown

from tests.support.ranks import on_ranks

EPS = torch.finfo(torch.float32).eps
STEPS = 3


def module() -> Any:
    names = defined()
    exec(shown("The same with Lightning"), names)
    return names["PPO"](names["policy"]())


def stored() -> Iterator[tuple[Tensor, ...]]:
    """Batches as a sampler stores them: its log-probabilities are near those of the policy."""
    draw = torch.Generator().manual_seed(2)
    for ids, replies, advantages in defined()["batches"](STEPS):
        yield ids, replies, advantages, -7 + 0.5 * torch.randn(ids[:, 1:].shape, generator=draw)


def plainly(model: nn.Module) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for ids, replies, advantages, old_logp in stored():
        log_p = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        ratio = (log_p.gather(-1, ids[:, 1:, None]).squeeze(-1) - old_logp).exp()
        worse = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.28) * advantages[:, None])
        loss = -worse[replies[:, 1:]].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Heard(lightning.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.losses.append(trainer.callback_metrics["loss"].item())


def trained(rows: slice, folder: str, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """By Lightning, on these rows of every batch."""
    ours, heard = module(), Heard()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[heard], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip
    batches = [tuple(x[rows] for x in batch) for batch in stored()]
    trainer.fit(ours, torch.utils.data.DataLoader(batches, batch_size=None))
    assert trainer.global_step == STEPS
    return heard.losses, ours.model.state_dict()


def on_a_rank(rank: int, folder: str) -> tuple[list[float], dict[str, Tensor]]:
    os.environ["LOCAL_RANK"] = str(rank)  # Lightning then takes the processes for somebody else's
    return trained(slice(rank, None, 2), folder, devices=2, strategy="ddp", use_distributed_sampler=False)


def as_without(losses: list[float], weights: dict[str, Tensor]) -> None:
    before, theirs = defined()["policy"]().state_dict(), defined()["policy"]()
    assert losses == pytest.approx(plainly(theirs), rel=100 * EPS)
    for name, x in theirs.state_dict().items():
        moved = (x - before[name]).norm()
        assert moved > 0
        assert (weights[name] - x).norm() <= 100 * EPS * moved + STEPS * EPS * x.norm(), name


def test_three_steps_are_those_of_a_plain_loop(tmp_path) -> None:
    as_without(*trained(slice(None), str(tmp_path), devices=1))


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path) -> None:
    (mine, weights), (others, same) = on_ranks(2, on_a_rank, str(tmp_path))
    assert all(torch.equal(x, same[name]) for name, x in weights.items())
    as_without([a + b for a, b in zip(mine, others, strict=True)], weights)
