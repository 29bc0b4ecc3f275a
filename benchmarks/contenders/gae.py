"""Advantages of 128 replies of 4096 tokens: the loops that trainers run, and the fastest forms that torch allows.

The loops are those of TRL, verl and OpenRLHF in our own words, with the same operations per step on [B, T] tensors;
their extra whitening is left out for everybody.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_kernels as rk
from benchmarks.contenders.base import Contender, Skipped, wants_gpu
from benchmarks.contenders.loading import module
from benchmarks.work.replies import GAMMA, LAM, Pair, Replies

CHUNK = 128


def trl_loop(batch: Replies) -> Pair:
    rewards, values, _ = batch
    last, reversed_advantages = 0.0, []
    steps = values.shape[1]
    for t in reversed(range(steps)):
        after = values[:, t + 1] if t < steps - 1 else 0.0
        delta = rewards[:, t] + GAMMA * after - values[:, t]
        last = delta + GAMMA * LAM * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages, advantages + values


def verl_loop(batch: Replies) -> Pair:
    rewards, values, mask = batch
    after, last, reversed_advantages = 0.0, 0.0, []
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        carried = rewards[:, t] + GAMMA * after - values[:, t] + GAMMA * LAM * last
        after = values[:, t] * here + (1 - here) * after
        last = carried * here + (1 - here) * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages, advantages + values


def openrlhf_loop(batch: Replies) -> Pair:
    rewards, values, mask = batch
    values, rewards = mask * values, mask * rewards
    return trl_loop(Replies(rewards, values, mask))


def _deltas(batch: Replies) -> Tensor:
    return torch.add(batch.rewards, F.pad(batch.values[:, 1:], (0, 1)), alpha=GAMMA) - batch.values


def chunked_matmul(batch: Replies) -> Pair:
    """slime's idea: a chunk's advantages are its deltas times a triangle of powers; only chunk ends are sequential."""
    values = batch.values
    n, steps = values.shape
    decay, pad = GAMMA * LAM, -steps % CHUNK
    delta = F.pad(_deltas(batch), (0, pad))
    position = torch.arange(CHUNK, device=values.device)
    distance = position[:, None] - position
    powers = torch.where(distance >= 0, torch.tensor(decay, device=values.device) ** distance.clamp(min=0), 0.0)
    local = (delta.view(-1, CHUNK) @ powers).view(n, -1, CHUNK)
    tail, carry = torch.zeros(local.shape[1] + 1, n, device=values.device), decay**CHUNK
    for k in reversed(range(local.shape[1])):
        tail[k] = local[:, k, 0] + carry * tail[k + 1]
    reach = torch.tensor(decay, device=values.device) ** (CHUNK - position)
    advantages = (local + tail[1:].t()[:, :, None] * reach).view(n, -1)[:, :steps]
    return advantages, advantages + values


def _in_torch(run: Callable[[Replies], Pair]) -> Callable[[Replies], Callable[[], Pair]]:
    return lambda batch: torch.no_grad()(lambda: run(batch))


def _recursive_filter(batch: Replies) -> Callable[[], Pair]:
    """A recursive filter run backwards, as Spinning Up discounts: single-threaded C over each row."""
    from scipy.signal import lfilter

    if batch.values.is_cuda:
        raise Skipped("runs on a CPU")

    def step() -> Pair:
        deltas = _deltas(batch).numpy()
        backwards = lfilter([1.0], [1.0, -GAMMA * LAM], deltas[:, ::-1], axis=1)
        advantages = torch.from_numpy(backwards[:, ::-1].astype("float32"))
        return advantages, advantages + batch.values

    return step


def _rl_triton(batch: Replies) -> Callable[[], Pair]:
    wants_gpu(batch.values)
    compute_gae = module("rl_triton").compute_gae
    rewards, values, mask = batch
    terminated = torch.zeros_like(mask)
    beyond = torch.zeros(len(values), device=values.device)

    def step() -> Pair:
        advantages = compute_gae(rewards, values, terminated, gamma=GAMMA, lambda_=LAM, last_value=beyond)
        return advantages, advantages + values

    return step


def _ours(batch: Replies) -> Callable[[], Pair]:
    n, steps = batch.values.shape
    cu_seqlens = torch.arange(0, n * steps + 1, steps, device=batch.values.device)

    def step() -> Pair:
        advantages, returns = rk.gae(
            batch.rewards.view(-1), batch.values.view(-1), cu_seqlens, gamma=GAMMA, lam=LAM, mask=None
        )
        return advantages.view(n, steps), returns.view(n, steps)

    return step


CONTENDERS = (
    Contender("TRL's loop", "peer", _in_torch(trl_loop)),
    Contender("verl's loop", "peer", _in_torch(verl_loop)),
    Contender("OpenRLHF's loop", "peer", _in_torch(openrlhf_loop)),
    Contender("chunked matmul in torch, after slime", "peer", _in_torch(chunked_matmul)),
    Contender("scipy lfilter", "peer", _recursive_filter),
    Contender("rl-triton compute_gae", "peer", _rl_triton, gpu=True),
    Contender("rk.gae", "ours", _ours),
)
