"""What the tests of the CPU backends do not ask of the GPU kernels, and a reviewer's mutants survived."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

import rlhf_kernels as rk
from rlhf_kernels import reference
from rlhf_kernels.backends import triton as backend
from rlhf_kernels.backends.triton import table
from rlhf_kernels.backends.triton.calculus import exponentials, tanh
from rlhf_kernels.backends.triton.operands import Operand, describable
from rlhf_kernels.backends.triton.rows import piece
from rlhf_kernels.types import Head, Tile
from tests.support.problems import assert_gradient, assert_value


@triton.jit
def elementary_kernel(x, exp, hyperbolic, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(exp + at, exponentials(tl.load(x + at)))
    tl.store(hyperbolic + at, tanh(tl.load(x + at)))


@pytest.mark.parametrize("reach", [1e-3, 1.0, 80.0])
def test_elementary_functions_to_a_few_ulps(reach):
    """Rounding d log2(e) alone would cost an exponential as many ulps as |d|."""
    x = torch.linspace(-reach, reach, 1024)
    exp, hyperbolic = torch.empty_like(x), torch.empty_like(x)
    elementary_kernel[(1,)](x, exp, hyperbolic, BLOCK=1024)
    for got, want in ((exp, x.double().exp()), (hyperbolic, x.double().tanh())):
        assert (got.double() / want - 1).abs().max() <= 4 * torch.finfo(torch.float32).eps


@pytest.fixture(params=["strips", "fused"])
def _way(request, monkeypatch):
    listed = table.INTERPRETED.by(request.param)
    monkeypatch.setattr(backend, "entry", lambda device: listed)


@pytest.mark.usefixtures("_way")
def test_saturated_logits_that_bfloat16_exponentials_cannot_hold():
    """A softcap of 60 leaves 120 nats between logits: the exponential of the lowest is zero, its gradient no NaN."""
    hidden = torch.tensor([[1.0, 0.0], [-1.0, 0.5]], dtype=torch.bfloat16)
    weight = torch.linspace(-900, 900, 140).bfloat16()[:, None] * torch.tensor([[1.0, 0.01]], dtype=torch.bfloat16)
    targets, grads, values = torch.tensor([139, 0]), {}, {}
    for kind in (torch.float64, torch.float32, torch.bfloat16):
        x, w = (t.to(torch.float64 if kind == torch.float64 else t.dtype).requires_grad_() for t in (hidden, weight))
        stats = reference.token_stats(x, w, targets, softcap=60.0, dtype=kind)
        (stats.logp.sum() + stats.entropy.sum() + 0.1 * stats.mean_logit.sum()).backward()
        values[kind], grads[kind] = stats, (x.grad, w.grad)
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    stats = rk.token_stats(x, w, targets, softcap=60.0, backend="triton")
    (stats.logp.sum() + stats.entropy.sum() + 0.1 * stats.mean_logit.sum()).backward()
    for name in ("logp", "entropy", "lse"):
        want = [getattr(values[kind], name).detach() for kind in (torch.float64, torch.float32)]
        assert_value(name, getattr(stats, name).detach(), want[0], want[1], torch.float32, scale=60.0)
    for i, got in enumerate((x.grad, w.grad)):
        assert_gradient(("hidden", "weight")[i], got, grads[torch.float64][i], grads[torch.bfloat16][i], x.dtype)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("gap", [40.0, 120.0])
def test_a_target_that_only_the_reference_finds_improbable(direction, gap):
    """Beyond 88 nats its sums overflow: the row is folded again from the largest logits of both."""
    n, vocab = 6, 290
    rng = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, n, vocab, generator=rng)
    targets = torch.randint(vocab, (n,), generator=rng)
    ref_logits[torch.arange(n), targets] -= torch.tensor([0.0, gap, 0.0, 0.0, gap, 0.0])
    ref_logits[4] += 50.0
    found = []
    for fn, kind, options in (
        (reference.kl_divergence, torch.float64, {}),
        (reference.kl_divergence, torch.float32, {"dtype": torch.float32}),
        (rk.kl_divergence, torch.float32, {"backend": "triton"}),
    ):
        x, w, ref_x, ref_w = (t.to(kind) for t in (torch.eye(n), logits.T, torch.eye(n), ref_logits.T))
        x.requires_grad_(), w.requires_grad_()
        kl = fn(x, w, ref_x, ref_w, targets, direction=direction, **options)
        kl.sum().backward()
        found.append((kl.detach(), x.grad, w.grad))
    (exact, *exact_grads), (upcast, *plain_grads), (got, *got_grads) = found
    assert_value("kl", got, exact, upcast, torch.float32, scale=gap)
    for mine, want, plain in zip(got_grads, exact_grads, plain_grads, strict=True):
        assert_gradient("gradient", mine, want, plain, torch.float32)


@pytest.mark.usefixtures("_way")
def test_a_row_is_rescued_over_more_tiles_than_programs():
    n, vocab = 3, 2500
    logits = torch.randn(n, vocab, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([7, 2499, 11])
    logits[0, 7], logits[1, 2499], logits[0, 2400] = -150.0, -70.0, 4.0
    x, w, grads = torch.eye(n), logits.T.contiguous(), []
    for fn, kind, options in (
        (reference.token_stats, torch.float64, {}),
        (rk.token_stats, torch.float32, {"backend": "triton"}),
    ):
        head = w.to(kind).requires_grad_()
        stats = fn(x.to(kind), head, targets, **options)
        (stats.logp.sum() + stats.entropy.sum()).backward()
        grads.append((stats.logp.detach().double(), stats.entropy.detach().double(), head.grad.double()))
    for got, want in zip(grads[1], grads[0], strict=True):
        assert torch.allclose(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.usefixtures("_way")
def test_rounding_changes_no_sign():
    rng = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(64, 24, generator=rng), torch.randn(40, 24, generator=rng)
    bias, targets = torch.zeros(40), torch.full((64,), 3)
    bias[3] = 60.0  # certain: what is left of logp and entropy is rounding
    with torch.no_grad():
        stats = rk.token_stats(hidden, weight, targets, bias=bias, backend="triton")
        kl = rk.kl_divergence(hidden, weight, hidden, weight * (1 + 1e-7), targets, backend="triton")
    assert (stats.logp <= 0).all()
    assert (stats.entropy >= 0).all()
    assert (kl >= 0).all()


def test_ties_are_won():
    z = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    assert rk.token_stats_from_logits(z, torch.tensor([0, 1, 2]), backend="triton").top1.tolist() == [1.0, 0.0, 1.0]


def test_a_forbidden_target_among_logits_far_below_zero():
    """Its logit is no anchor: zero takes its place, and may lie too far above all the others."""
    z = torch.randn(2, 300, generator=torch.Generator().manual_seed(3)) - 100.0
    z[0, 5] = -torch.inf
    stats = rk.token_stats_from_logits(z, torch.tensor([5, 7]), backend="triton")
    log_p = z.double().log_softmax(-1)
    assert stats.logp[0] == -torch.inf
    assert torch.allclose(stats.logp[1].double(), log_p[1, 7], rtol=1e-6)
    assert torch.allclose(stats.lse.double(), z.double().logsumexp(-1), rtol=1e-6)
    assert torch.allclose(stats.entropy.double(), -(log_p.exp() * log_p).nansum(-1), rtol=2e-6)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("everything", [False, True], ids=["logp", "and entropy"])
def test_gradients_of_bfloat16_logits_add_up_to_nothing(everything):
    """What rounds each exponential by 2^-9 may not bias their sum: all probabilities together are still one."""
    rng = torch.Generator().manual_seed(2)
    hidden, weight = torch.rand(40, 16, generator=rng).bfloat16(), torch.randn(300, 16, generator=rng).bfloat16()
    full = torch.zeros(weight.shape)
    targets = torch.randint(300, (40,), generator=rng)
    stats = rk.token_stats(hidden, weight.requires_grad_(), targets, weight_grad=full, backend="triton")
    (stats.logp.sum() + (0.1 * stats.entropy.sum() if everything else 0.0)).backward()
    assert full.sum(0).abs().max() <= 1e-3 * hidden.float().sum(0).max()


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("each", [False, True], ids=["one temperature", "one per token"])
def test_plain_gradients_know_temperature_and_scale(each):
    """Where only log p of bfloat16 hidden states counts, no pass over the logits is made: the factor has them all."""
    rng = torch.Generator().manual_seed(6)
    hidden, weight = torch.randn(9, 16, generator=rng).bfloat16(), torch.randn(200, 16, generator=rng).bfloat16()
    targets = torch.randint(200, (9,), generator=rng)
    options = {"logit_scale": 0.3, "temperature": torch.linspace(0.4, 2.0, 9) if each else 0.5}
    found = []
    for fn, kind, more in (
        (reference.token_stats, torch.float64, {}),
        (reference.token_stats, torch.bfloat16, {"dtype": torch.bfloat16}),
        (rk.token_stats, torch.bfloat16, {"backend": "triton"}),
    ):
        x, w = hidden.to(kind).requires_grad_(), weight.to(kind).requires_grad_()
        fn(x, w, targets, **options, **more).logp.sum().backward()
        found.append((x.grad, w.grad))
    for exact, plain, got in zip(*found, strict=True):
        assert_gradient("gradient", got, exact, plain, torch.bfloat16)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("each", [False, True], ids=["one temperature", "one per token"])
@pytest.mark.parametrize("depth", [60.0, 89.0, 95.0])
def test_a_capped_target_whose_exponential_would_underflow_keeps_its_gradient(depth, each):
    """Far from the cap it is steep, however improbable the token is."""
    cap, temperature = 30.0, 0.3
    low = -cap * torch.tensor(depth * temperature / cap - 0.95).double().atanh()
    weight = torch.tensor([[cap * 1.8318], [low.item()], [0.0]]).bfloat16()  # tanh(1.8318) = 0.95
    hidden, targets, found = torch.ones(2, 1, dtype=torch.bfloat16), torch.tensor([1, 1]), []
    options = {"softcap": cap, "temperature": torch.full((2,), temperature) if each else temperature}
    for fn, kind, more in (
        (reference.token_stats, torch.float64, {}),
        (rk.token_stats, torch.bfloat16, {"backend": "triton"}),
    ):
        w = weight.to(kind).requires_grad_()
        fn(hidden.to(kind), w, targets, **options, **more).logp.sum().backward()
        found.append(w.grad.double())
    assert found[0][1].abs() > 0.1
    assert torch.allclose(found[1], found[0], rtol=2e-2, atol=1e-3)


@pytest.mark.usefixtures("_way")
def test_a_later_id_that_is_no_column_has_no_value():
    """Not that of the column that its low half names, nor of one past the last."""
    hidden, weight = torch.randn(3, 8).bfloat16(), torch.randn(40, 8).bfloat16()
    ids = torch.tensor([[1, 2**32 + 5], [2, 40], [3, -7]])
    logp = rk.token_logps(hidden, weight, ids, backend="triton", checks=False)
    assert logp[:, 1].isnan().all()
    assert logp[:, 0].isfinite().all()


def test_no_program_has_more_threads_than_columns():
    for pieces in (table.PIECES, table.SMALL_PIECES):
        for vocab in (1, 5, 128, 129, 5000, 151_936):
            assert pieces.columns >= piece(vocab, pieces) >= 32 * pieces.num_warps
    for e in (*table.BY_CAPABILITY.values(), table.CONSERVATIVE, table.INTERPRETED):
        assert e.strip % e.pieces.columns == e.strip % e.fold.width == 0


def test_torch_s_own_setting_decides_how_float32_is_multiplied():
    rows = backend.rows_of(Tile(torch.zeros(3, 4), Head(torch.zeros(7, 4)), torch.zeros(3, 1, dtype=torch.int64), 1.0))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        found = []
        for setting in ("ieee", "tf32"):  # the newer of torch's two ways to say so, after which the older one raises
            torch.backends.cuda.matmul.fp32_precision = setting
            found.append(backend.Plan.of(rows, table.CONSERVATIVE, keeps=True).precision)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert found == ["ieee", "tf32"]


@pytest.mark.parametrize(
    ("shape", "stride", "fits"),
    [((3, 64), (64, 1), True), ((3, 60), (64, 1), True), ((3, 60), (60, 1), False), ((3, 64), (0, 1), False)],
    ids=str,
)
def test_what_the_tensor_memory_accelerator_can_read(shape, stride, fits):
    x = torch.zeros(512, dtype=torch.bfloat16).as_strided(shape, stride)
    good = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert describable(Operand(x, good, None, None, 1.0)) is fits
    assert not describable(Operand(good.float(), good, None, None, 1.0))
    assert not describable(Operand(good, torch.zeros(513, dtype=torch.bfloat16)[1:].view(8, 64), None, None, 1.0))


def test_a_chip_like_10_0_gets_its_entry(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 3))
    with pytest.warns(UserWarning, match=r"10\.3.*that of 10\.0 runs"):
        assert table.entry(torch.device("cuda")).precise == "tf32x3"
