"""Losses in several threads at once: each call gives what it gives alone, bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

import rlhf_kernels as rk

ROWS, SIZE, VOCAB, THREADS = 16, 8, 200, 4
Result = list[Tensor]
PIECES = 80_000  # bytes: several pieces, whose logits take each other's place


@pytest.fixture(autouse=True)
def _restless() -> Iterator[None]:
    """Threads that take turns between any two steps, as they do now and then on a busy machine."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Given:
    """Arguments of a loss, drawn from a seed. Odd seeds have fewer rows, so that calls want memory of two sizes."""

    def __init__(self, seed: int):
        draw, n = torch.Generator().manual_seed(seed), ROWS - 4 * (seed % 2)
        self.hidden = torch.randn(n, SIZE, generator=draw).requires_grad_()
        self.weight = torch.randn(VOCAB, SIZE, generator=draw).requires_grad_()
        self.ref = (torch.randn(n, SIZE, generator=draw), torch.randn(VOCAB, SIZE, generator=draw))
        self.targets = torch.randint(VOCAB, (n,), generator=draw)
        self.old_logp, self.advantages = -6 + torch.randn(n, generator=draw), torch.randn(n, generator=draw)
        self.head = (self.hidden, self.weight, self.targets)
        self.ends = torch.tensor([0, n // 4, n // 2, 3 * n // 4, n])

    def gradients(self, loss: Tensor) -> Result:
        """Scaled, which a loss does in place."""
        return [loss.detach(), *torch.autograd.grad(1.7 * loss, (self.hidden, self.weight), retain_graph=True)]


LOSSES: dict[str, Callable[..., Tensor]] = {
    "ppo": lambda g, b: rk.ppo_loss(*g.head, g.old_logp, g.advantages, entropy_coef=0.01, backend=b).loss,
    "grpo": lambda g, b: (
        rk.grpo_loss(*g.head, g.old_logp, g.advantages, ref=g.ref, kl="exact", kl_coef=0.1, backend=b).loss
    ),
    "sft in pieces": lambda g, b: rk.sft_loss(*g.head, backend=b, max_bytes=PIECES).loss,
    "dpo": lambda g, b: rk.dpo_loss(*g.head, g.ends, ref_logp=g.old_logp, backend=b).loss,
    "tolerance": lambda g, b: rk.sft_loss(*g.head, backend=b, tolerance=0.01).loss,
    "exact kl": lambda g, b: rk.kl_divergence(g.hidden, g.weight, *g.ref, g.targets, backend=b).sum(),
    "statistics in pieces": lambda g, b: rk.token_stats(*g.head, backend=b, max_bytes=PIECES).entropy.sum(),
}


def alike(a: Result, b: Result) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def at_once(work: Callable[[int], None]) -> None:
    """``work(thread)`` in every thread; the first error of any of them is raised."""
    start = Barrier(THREADS)

    def begin(thread: int) -> None:
        start.wait()
        work(thread)

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(begin, thread) for thread in range(THREADS)]:
            done.result()


def test_every_loss_at_once(backend: str) -> None:
    def once(name: str, seed: int) -> Result:
        given = Given(seed)
        return given.gradients(LOSSES[name](given, backend))

    cases = [(name, seed) for name in LOSSES for seed in range(2)]
    want = {case: once(*case) for case in cases}

    def work(thread: int) -> None:
        for k in range(2 * len(cases)):
            case = cases[(k + 3 * thread) % len(cases)]
            assert alike(once(*case), want[case]), case

    at_once(work)


def test_memory_that_another_thread_was_quicker_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """The race of the test above, lost on purpose."""
    native = pytest.importorskip("rlhf_kernels.backends.native", reason="the extension is not built")

    class Taken(list):
        """Looks as if there were something, until it is asked for."""

        def __len__(self) -> int:
            return 1

    monkeypatch.setattr(native, "_offered", Taken())
    given = Given(0)
    assert LOSSES["ppo"](given, "native").isfinite()


@pytest.mark.parametrize("name", LOSSES)
def test_forward_here_and_backward_there(backend: str, name: str) -> None:
    """Of many graphs, each made in one thread while others make and use theirs."""
    seeds = range(6)
    want = [given.gradients(LOSSES[name](given, backend)) for given in map(Given, seeds)]
    with ThreadPoolExecutor(2) as makers, ThreadPoolExecutor(2) as users:
        graphs = makers.map(lambda seed: (given := Given(seed), LOSSES[name](given, backend)), seeds)
        got = list(users.map(lambda made: made[0].gradients(made[1]), graphs))
    assert all(alike(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_backward_of_one_graph_in_every_thread(backend: str, name: str) -> None:
    """Only one of them can have what forward has kept; the others compute it once more."""
    given = Given(0)
    want = given.gradients(LOSSES[name](given, backend))
    for _ in range(5):
        loss, got = LOSSES[name](given, backend), []
        at_once(lambda _, loss=loss, got=got: got.append(given.gradients(loss)))
        assert all(alike(x, want) for x in got)


def test_an_error_in_one_thread_is_nobody_elses(backend: str) -> None:
    """Neither a bad argument nor one that the objective raises, between forward and backward of a piece."""

    class Mine(Exception):
        pass

    def fails(stats, cu_seqlens):
        raise Mine

    want = [given.gradients(LOSSES["ppo"](given, backend)) for given in map(Given, range(2))]

    def work(thread: int) -> None:
        for k in range(25):
            given = Given(k % 2)
            if thread == 0:
                with pytest.raises(Mine):
                    rk.fused_loss(*given.head, fails, backend=backend)
            elif thread == 1:
                with pytest.raises(ValueError, match="old_logp"):
                    rk.ppo_loss(*given.head, given.old_logp[:-1], given.advantages, backend=backend)
            else:
                assert alike(given.gradients(LOSSES["ppo"](given, backend)), want[k % 2])

    at_once(work)


@pytest.mark.parametrize("max_bytes", [None, 300_000])
def test_backward_twice_gives_the_same_bits(backend: str, max_bytes: int | None) -> None:
    """Also where few rows have a gradient: a second backward has nothing left of the first, and computes anew."""
    draw = torch.Generator().manual_seed(8)
    hidden, weight = (torch.randn(n, 24, generator=draw).requires_grad_() for n in (64, 3001))
    logp = rk.token_stats(hidden, weight, torch.arange(64), backend=backend, max_bytes=max_bytes).logp
    upstream = torch.randn(64, generator=draw).where(torch.arange(64) % 3 > 0, 0.0)
    first, *more = (torch.autograd.grad(logp, (hidden, weight), upstream, retain_graph=True) for _ in range(3))
    assert all(alike(list(again), list(first)) for again in more)
