"""Where the C++ backend leaves its gradients and its logits: fresh memory, and memory that was used before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.native_oracle import draw, full, make_grads, make_sinks, make_tile

pytest.importorskip("rlhf_kernels._C", reason="the extension is not built")

import rlhf_kernels as rk
from rlhf_kernels.backends import native
from tests.kernels.backends.native.test_native import BF16, DTYPES, gradients, isa  # noqa: F401  (every instruction set here too)


@pytest.mark.parametrize(("n", "size", "vocab"), [(1100, 9, 150), (21, 150, 300)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fresh_sinks(n: int, size: int, vocab: int, dtype: torch.dtype) -> None:
    """Whatever they held is overwritten by the same sums, which bfloat16 rounds once."""
    tile = make_tile(n, size, vocab, dtype, bias=draw(vocab, seed=9, dtype=dtype))
    grads, rows = make_grads(tile), torch.arange(0, n, 1 if n > 1000 else 2)
    want, stats = gradients(tile, grads, rows), native.score(tile)
    for kind in {full(tile), BF16 if dtype == BF16 else full(tile)}:
        into = make_sinks(tile, len(rows))
        weight = torch.full((vocab, size), torch.nan, dtype=kind)
        into = into._replace(weight=weight, bias=torch.full_like(want["bias"], torch.nan), fresh=True)
        native.backward(tile, native.forward(tile)[1], stats, grads, rows, into)
        assert torch.equal(weight, want["weight"].to(kind))
        assert torch.equal(into.bias, want["bias"])
        assert torch.equal(into.hidden, want["hidden"])


def test_logits_of_the_next_call_are_where_those_of_the_last_were() -> None:
    """Unless they do not fit; what the pages hold does not matter."""

    def step(rows: int) -> tuple[Tensor, int]:
        hidden, weight = draw(rows, 8, seed=1).requires_grad_(), draw(300, 8, seed=2).requires_grad_()
        stats = rk.token_stats(hidden, weight, torch.arange(rows), backend="native")
        stats.logp.sum().backward()
        (left,) = native._offered  # although the statistics are still there
        assert hidden.grad is not None
        return hidden.grad, left.untyped_storage().data_ptr()

    if not native._C.offer_pages(0, 0):
        pytest.skip("the system does not take pages back")
    native._offered.clear()
    want, first = step(40)
    native._offered[0].fill_(torch.nan)
    again, second = step(40)
    assert torch.equal(want, again)
    assert first == second == step(30)[1] == step(40)[1]
    assert step(60)[0].shape == (60, 8)
    assert native._offered[0].numel() == 60 * 300
