"""The C++ kernels, every instruction set that runs here, against plain torch in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.native_oracle import draw, full, make_grads, make_sinks, make_tile, plain, plain_gradients

pytest.importorskip("rlhf_kernels._C", reason="the extension is not built")

from rlhf_kernels import _C
from rlhf_kernels.backends import native
from rlhf_kernels.types import Grads, Head, Reference, Tile

BF16 = torch.bfloat16
DTYPES = [torch.float32, BF16, torch.float16, torch.float64]


@pytest.fixture(params=_C.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(best)


def gradients(tile: Tile, grads: Grads, rows: Tensor | None = None) -> dict[str, Tensor]:
    stats, residual = native.forward(tile)
    sinks = make_sinks(tile, None if rows is None else rows.numel())
    native.backward(tile, residual, stats, grads, rows, sinks)
    return {name: x for name, x in sinks._asdict().items() if isinstance(x, Tensor)}


def off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300))


def check(tile: Tile) -> None:
    """Statistics and gradients against float64: at most twice the error of torch on the same inputs.

    Statistics compete with torch on float32-upcast inputs, gradients with torch in the dtype of the inputs.
    """
    exact, peer = plain(tile, torch.float64)[1], plain(tile, full(tile))[1]
    scored, kept = native.score(tile), native.forward(tile)[0]
    unit = 1e-13 if full(tile) == torch.float64 else 2.5e-7
    for name, want in exact.items():
        got = getattr(scored, name)
        assert got.dtype == full(tile)
        assert torch.equal(got, getattr(kept, name)), name
        allowed = 2 * (peer[name].double() - want).abs().max() + unit * (want.abs().max() + 1)
        assert (got.double() - want).abs().max() <= allowed, name
    assert scored.top1 is not None
    assert (scored.entropy >= 0).all()
    assert (scored.logp <= 0).all()
    grads = make_grads(tile)
    want, same = plain_gradients(tile, grads, torch.float64), plain_gradients(tile, grads, tile.hidden.dtype)
    got = gradients(tile, grads)
    assert got.keys() == want.keys()
    for name in want:
        assert off(got[name], want[name]) <= 2 * off(same[name], want[name]) + unit, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "size", "vocab"), [(1, 1, 2), (1, 7, 131), (5, 33, 1031), (37, 64, 2500), (18, 530, 17), (70, 9, 31013)]
)
def test_shapes(n: int, size: int, vocab: int, dtype: torch.dtype) -> None:
    check(make_tile(n, size, vocab, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(dtype: torch.dtype) -> None:
    """Everything at once, and three ids per row, of which some rows ask for one twice."""
    options = {
        "bias": draw(333, seed=9, dtype=dtype),
        "softcap": 7.0,
        "logit_scale": 1.7,
        "temperature": torch.linspace(0.4, 2.0, 19),
    }
    tile = make_tile(19, 21, 333, dtype, k=3, **options)
    tile.targets[::2, 2] = tile.targets[::2, 0]
    check(tile)
    check(replace(tile, temperature=0.7, head=replace(tile.head, softcap=None)))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference(dtype: torch.dtype, direction: str) -> None:
    head = Head(draw(1100, 12, seed=21, dtype=dtype), draw(1100, seed=22, dtype=dtype), logit_scale=0.5)
    reference = Reference(draw(9, 12, seed=20, dtype=dtype), head, direction)
    check(make_tile(9, 35, 1100, dtype, reference=reference, temperature=1.3, softcap=20.0))


def test_no_rows() -> None:
    tile = make_tile(0, 5, 700, BF16, k=2)
    assert native.score(tile).logp.shape == (0, 2)
    got = gradients(tile, make_grads(tile))
    assert got["hidden"].shape == (0, 5)
    assert not got["weight"].any()


def test_kl_to_itself_is_zero() -> None:
    tile = make_tile(9, 40, 700, torch.float32)
    same = replace(tile, reference=Reference(tile.hidden, tile.head))
    kl = native.score(same).kl
    assert kl is not None
    assert (kl >= 0).all()
    assert kl.max() < 1e-6


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_kl_over_forbidden_columns(direction: str) -> None:
    """Columns that neither head has add nothing; one that only the first has makes the divergence infinite."""
    tile = make_tile(6, 40, 700, torch.float32)
    few, bias = tile.head.weight, torch.zeros(700)
    assert few is not None
    bias[::3] = -torch.inf
    tile = replace(tile, targets=torch.full((6, 1), 1), head=Head(few, bias))
    columns = bias == 0
    ref_weight = draw(700, 9, seed=5)
    tile = replace(tile, reference=Reference(draw(6, 9, seed=6), Head(ref_weight, bias), direction))
    assert tile.reference is not None
    less_ref = replace(tile.reference, head=Head(ref_weight[columns]))
    less = replace(tile, head=Head(few[columns]), targets=torch.zeros(6, 1, dtype=torch.int64), reference=less_ref)
    got, want = native.score(tile).kl, native.score(less).kl
    assert got is not None
    assert want is not None
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    grads = make_grads(less)
    grads.mean_logit.zero_()
    assert off(gradients(tile, grads)["hidden"], gradients(less, grads)["hidden"]) < 1e-6
    head, ref_head = (Head(few), Head(ref_weight, bias)) if direction == "reverse" else (tile.head, Head(ref_weight))
    infinite = replace(tile, head=head, reference=replace(tile.reference, head=ref_head))
    kl = native.score(infinite).kl
    assert kl is not None
    assert kl.isposinf().all()


@pytest.mark.parametrize("shift", [-500.0, 80.0])
def test_far_from_zero(shift: float) -> None:
    """All logits negative, or large: a shift changes lse and nothing else."""
    tile = make_tile(8, 16, 901, torch.float32)
    check(replace(tile, head=replace(tile.head, bias=torch.full((901,), shift))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(dtype: torch.dtype) -> None:
    """Logits of +-80 and beyond, and logp far below -60."""
    tile = make_tile(12, 24, 777, dtype, spread=40.0)
    assert plain(tile, torch.float64)[1]["logp"].min() < -60
    check(tile)


def test_half_precision_loses_nothing() -> None:
    """logp within 2e-5 of float64 at a logit standard deviation of 6, hidden 512."""
    tile = make_tile(24, 512, 5000, BF16, spread=6.0)
    stats, exact = native.score(tile), plain(tile, torch.float64)[1]
    assert (stats.logp - exact["logp"]).abs().max() < 2e-5
    assert (stats.entropy - exact["entropy"]).abs().max() < 2e-5


def test_nearly_certain_rows() -> None:
    """logp and entropy keep their relative accuracy however close to zero they are."""
    z = torch.zeros(3, 1500)
    z[:, 7] = torch.tensor([20.0, 40.0, 80.0])
    stats = native.score(Tile(z, Head(None), torch.full((3, 1), 7), 1.0))
    rest = 1499 * torch.exp(-z[:, 7].double())
    torch.testing.assert_close(stats.logp[:, 0].double(), -torch.log1p(rest), rtol=1e-6, atol=0)
    entropy = torch.log1p(rest) + rest * z[:, 7] / (1 + rest)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gone", [-torch.inf, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_forbidden_columns(gone: float, dtype: torch.dtype) -> None:
    """A logit of minus infinity is a column that does not exist."""
    tile = make_tile(6, 20, 2100, dtype, k=2)
    columns = torch.arange(2100) % 3 != 0
    columns[:1030] = False
    assert tile.head.weight is not None
    tile = replace(tile, targets=torch.arange(2100)[columns][tile.targets % int(columns.sum())])
    less = replace(
        tile,
        head=Head(tile.head.weight[columns]),
        targets=columns.cumsum(0)[tile.targets] - 1,
    )
    masked = replace(tile, head=Head(tile.head.weight, bias=torch.where(columns, 0.0, gone)))
    got, want = native.score(masked), native.score(less)
    for name in ("logp", "entropy", "lse"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-6, atol=1e-6)
    grads = make_grads(tile)
    grads.mean_logit.zero_()
    left, right = gradients(masked, grads), gradients(less, grads)
    assert off(left["hidden"], right["hidden"]) < (1e-2 if dtype == BF16 else 1e-6)
    assert off(left["weight"][columns], right["weight"]) < (1e-2 if dtype == BF16 else 1e-6)
    assert not left["weight"][~columns].any()


def test_top1() -> None:
    z = torch.tensor([[1.0, 3.0, 3.0], [4.0, 3.0, 3.0], [-torch.inf, -1.0, -2.0]])
    top1 = native.score(Tile(z, Head(None), torch.tensor([[2], [1], [1]]), 1.0)).top1
    assert top1 is not None
    assert top1.tolist() == [1.0, 0.0, 1.0]


def test_nan_comes_out() -> None:
    tile = make_tile(4, 8, 1200, torch.float32)
    tile.hidden[2, 3] = torch.nan
    stats = native.score(tile)
    assert stats.lse.isnan().tolist() == [False, False, True, False]
    assert stats.logp.isnan().tolist() == [[False], [False], [True], [False]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [[0], [3, 4, 21], [1, *range(5, 40)]], ids=len)
def test_some_rows(dtype: torch.dtype, rows: list[int]) -> None:
    """Rows left out are rows without gradient."""
    tile = make_tile(40, 30, 1300, dtype, bias=draw(1300, seed=9, dtype=dtype))
    index = torch.tensor(rows)
    keep = torch.zeros(40, dtype=torch.bool)
    keep[index] = True
    grads = Grads(*(g * keep.view(-1, *[1] * (g.dim() - 1)) for g in make_grads(tile)))
    some, everything = gradients(tile, grads, index), gradients(tile, grads)
    assert off(some["hidden"], everything["hidden"][index]) < 1e-6
    for name in ("weight", "bias"):
        assert off(some[name], everything[name]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_repeatable(dtype: torch.dtype, isa: str) -> None:
    """Bitwise the same twice, and with csrc's own products on any number of threads."""
    tile = make_tile(70, 150, 3001, dtype, k=2, bias=draw(3001, seed=9, dtype=dtype))
    grads, threads = make_grads(tile), torch.get_num_threads()

    def run(count: int) -> list[Tensor]:
        torch.set_num_threads(count)
        stats = native.score(tile)
        return [x for x in stats if x is not None] + list(gradients(tile, grads).values())

    try:
        for count in (1, 2, 3) if _C.has_head() else (1,):
            assert all(torch.equal(a, b) for a, b in zip(run(count), run(1), strict=True)), count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_strides(dtype: torch.dtype) -> None:
    """Weights and sinks that are views of something larger."""
    wide = draw(400, 64, seed=2, scale=0.3, dtype=dtype)
    for weight in (wide[::2, :40], wide[:200, ::2][:, :30], wide[:200].T.contiguous().T):
        tile = make_tile(11, weight.shape[1], 200, dtype, weight=weight)
        dense = replace(tile, head=Head(weight.contiguous()))
        grads = make_grads(tile)
        stats, residual = native.forward(tile)
        assert all(a is b or torch.equal(a, b) for a, b in zip(stats, native.forward(dense)[0], strict=True))
        want = gradients(dense, grads)
        for sink in (torch.ones(200, 99)[:, : weight.shape[1]], torch.ones(weight.shape[1], 200).T):
            into = make_sinks(tile)._replace(weight=sink)
            native.backward(tile, residual, stats, grads, None, into)
            assert off(sink - 1, want["weight"]) < 1e-2 if dtype == BF16 else 1e-5


@pytest.mark.parametrize("missing", ["hidden", "weight", "bias"])
def test_missing_sinks(missing: str) -> None:
    """What nobody wants is left out; the rest is the same."""
    tile = make_tile(20, 33, 600, BF16, bias=draw(600, seed=9, dtype=BF16))
    grads = make_grads(tile)
    want, into = gradients(tile, grads), make_sinks(tile)._replace(**{missing: None})
    stats, residual = native.forward(tile)
    native.backward(tile, residual, stats, grads, None, into)
    assert getattr(into, missing) is None
    assert all(torch.equal(getattr(into, name), x) for name, x in want.items() if name != missing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_given_logits(dtype: torch.dtype) -> None:
    """Without a weight the rows are logits already."""
    tile = make_tile(13, 1025, 1025, dtype, weight=torch.eye(1025, dtype=dtype), k=2, softcap=4.0, temperature=0.9)
    direct = replace(tile, head=replace(tile.head, weight=None))
    before = tile.hidden.clone()
    for got, want in zip(native.score(direct), native.score(tile), strict=True):
        assert (got is None and want is None) or torch.allclose(got, want, rtol=1e-5, atol=1e-5)
    grads = make_grads(tile)
    assert off(gradients(direct, grads)["hidden"], plain_gradients(tile, grads, torch.float64)["hidden"]) < 5e-3
    assert torch.equal(before, tile.hidden)


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="set_isa: 'sse9'"):
        _C.set_isa("sse9")
