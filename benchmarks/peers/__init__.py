"""Peers that meet the head, one small adapter each. Entry points and defaults are theirs; only the calls are ours."""

from __future__ import annotations

from benchmarks.peers import cross_entropy, liger, plain_torch, trl, verl
from benchmarks.peers.base import Own, Skipped, Step, unable

_ALL = (plain_torch, trl, liger, verl, cross_entropy)
LOGP_PEERS = tuple(peer for adapter in _ALL for peer in adapter.LOGP)
OPS = sorted({op for adapter in _ALL for op in adapter.LOSSES})
OWN_LOSSES: dict[str, tuple[Own, ...]] = {
    op: tuple(own for adapter in _ALL for own in adapter.LOSSES.get(op, ())) for op in OPS
}
__all__ = ["LOGP_PEERS", "OWN_LOSSES", "Own", "Skipped", "Step", "unable"]
