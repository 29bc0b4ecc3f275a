"""Inside ``torch.compile`` the public losses and statistics are nodes of an unbroken graph, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import rlhf_kernels as rk
from tests.support.problems import PAIRS, make_problem, ref_logp, rollout

P = make_problem(seed=61, lengths=PAIRS, silent_sequences=2)
OLD, ADVANTAGES = rollout(P)
CU, REF = P.cu_seqlens, ref_logp(P)
EVEN = torch.arange(P.num_sequences) % 2 == 0
REF_HIDDEN, REF_WEIGHT = P.normal(*P.hidden.shape), P.normal(*P.weight.shape)
SCORES, RANKS = P.normal(12), torch.tensor([3, 1, 2, 1, 2, 2, 1, 3, 2, 1, 2, 3])

# Every public loss, with and without what changes its metrics: (function, arguments, options).
LOSSES: dict[str, tuple[Callable[..., rk.LossOutput], tuple[Any, ...], dict[str, Any]]] = {
    "ppo": (rk.ppo_loss, (OLD, ADVANTAGES), {"clip": (0.1, 0.3)}),
    "ppo, all": (rk.ppo_loss, (OLD, ADVANTAGES), {
        "dual_clip": 3.0, "entropy_coef": 0.01, "ref_logp": REF, "kl_coef": 0.1, "reduction": "sequence_mean",
        "cu_seqlens": CU, "num_sequences": 7, "temperature": 0.7, "bias": torch.linspace(-1, 1, P.weight.shape[0]),
    }),
    "ppo, exact KL": (rk.ppo_loss, (OLD, ADVANTAGES), {
        "ref": (REF_HIDDEN, REF_WEIGHT), "ref_head": {"logit_scale": 0.5}, "kl": "exact", "kl_coef": 0.1,
    }),
    "gspo": (rk.grpo_loss, (None, ADVANTAGES), {
        "ratio": "sequence", "cu_seqlens": CU, "clip": (3e-4, 4e-4), "softcap": 30.0,
    }),
    "dpo": (rk.dpo_loss, (CU, REF), {"beta": 0.3}),
    "dpo, anchored": (rk.dpo_loss, (CU, REF), {"sft_coef": 0.1, "margin": 0.2}),
    "ipo": (rk.ipo_loss, (CU, REF), {}),
    "kto": (rk.kto_loss, (CU, REF, EVEN, 0.1), {}),
    "orpo": (rk.orpo_loss, (CU,), {}),
    "simpo": (rk.simpo_loss, (CU,), {}),
    "simpo, anchored": (rk.simpo_loss, (CU,), {"sft_coef": 0.1}),
    "sft": (rk.sft_loss, (), {"label_smoothing": 0.1, "z_loss": 1e-3}),
}  # fmt: skip
NO_HEAD: dict[str, tuple[Callable[..., rk.LossOutput], Tensor, tuple[Any, ...], dict[str, Any]]] = {
    "value": (rk.value_loss, REF, (OLD,), {"mask": P.kept}),
    "value, clipped": (rk.value_loss, REF, (OLD,), {"mask": P.kept, "old_values": ADVANTAGES, "clip": 0.2}),
    "bradley-terry": (rk.bradley_terry_loss, SCORES, (), {"margin": 0.1}),
    "bradley-terry, ranks": (rk.bradley_terry_loss, SCORES, (), {"ranks": RANKS, "groups": 3}),
    "plackett-luce": (rk.plackett_luce_loss, SCORES, (RANKS, 3), {"top": 2}),
    "infonce": (rk.infonce_loss, SCORES, (RANKS == 1, torch.arange(12) // 4), {}),
}
STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token_stats": lambda x, w: (lambda s: (s.logp * s.entropy + 0.1 * s.lse + s.top1).sum())(
        rk.token_stats(x, w, P.targets, temperature=torch.linspace(0.5, 2.0, P.targets.numel()))
    ),
    "logp alone": lambda x, w: rk.token_stats(x, w, P.targets).logp.square().sum(),
    "mean_logit": lambda x, w: rk.token_stats(x, w, P.targets).mean_logit.square().sum(),  # type: ignore[union-attr]
    "from logits": lambda x, w: rk.token_stats_from_logits(x @ w.T, P.targets, overwrite=True).logp.square().sum(),
    "token_logps": lambda x, w: rk.token_logps(x, w, P.targets[:, None].clamp(0, 3) + torch.arange(3)).square().sum(),
    "kl": lambda x, w: rk.kl_divergence(x, w, REF_HIDDEN, REF_WEIGHT, P.targets, direction="forward").square().sum(),
}


def compiled(fn: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(fn, fullgraph=True, backend=backend, **options)


def run(fn: Callable[..., Any], *leaves: Tensor) -> tuple[Any, ...]:
    """A scalar, what is logged, and the gradients."""
    given = [x.clone().requires_grad_() for x in leaves]
    loss, logged = fn(*given)
    loss.backward()
    return loss.detach(), logged, *(x.grad for x in given)


def assert_same(fn: Callable[..., Any], *leaves: Tensor, **options: Any) -> None:
    want, got = run(fn, *leaves), run(compiled(fn, **options), *leaves)
    assert set(got[1]) == set(want[1])
    for name, x in want[1].items():
        assert torch.equal(got[1][name], x.to(got[1][name].dtype)), name
        assert not got[1][name].requires_grad
    for one, other in zip(got[:1] + got[2:], want[:1] + want[2:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_a_node(name: str):
    loss, args, options = LOSSES[name]

    def step(hidden: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = loss(hidden * 2.0, weight, P.targets, *args, **options)
        return out.loss * 0.5, out.metrics

    assert_same(step, P.hidden, P.weight)


@pytest.mark.parametrize("name", NO_HEAD)
def test_a_loss_without_a_head_is_a_node(name: str):
    loss, leaf, args, options = NO_HEAD[name]

    def step(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = loss(x * 2.0, *args, **options)
        return out.loss * 0.5, out.metrics

    assert_same(step, leaf)


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_a_node(name: str):
    assert_same(lambda x, w: (STATISTICS[name](x, w), {}), P.hidden, P.weight)


def test_every_public_loss_is_tried():
    tried = {one[0] for one in (*LOSSES.values(), *NO_HEAD.values())}
    assert {name for name in rk.__all__ if name.endswith("_loss")} == {fn.__name__ for fn in tried} | {"fused_loss"}


def test_the_bias_gets_its_gradient_too():
    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = rk.sft_loss(hidden, weight, P.targets, bias=bias)
        return out.loss, out.metrics

    assert_same(step, P.hidden, P.weight, P.normal(P.weight.shape[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype):
    def step(hidden: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = rk.ppo_loss(hidden, weight, P.targets, OLD, ADVANTAGES)
        return out.loss, out.metrics

    assert_same(step, P.hidden.to(dtype), P.weight.to(dtype))


def test_under_autocast():
    def step(hidden: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            out = rk.ppo_loss(hidden, weight, P.targets, OLD, ADVANTAGES)
        return out.loss, out.metrics

    assert_same(step, P.hidden, P.weight)


def test_ready_logits_and_statistics_under_autocast():
    def step(hidden: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            stats = rk.token_stats(hidden, weight, P.targets)
            ready = rk.token_stats_from_logits(weight[: P.targets.numel()], P.targets.clamp(max=3), bias=weight[0])
        return stats.logp.sum() + ready.entropy.sum(), {"lse": ready.lse.detach()}

    assert_same(step, P.hidden, P.weight)


def test_a_number_may_come_first():
    """The dtype and device of results are those of the head, in whatever order the arguments are named."""

    def step(hidden: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        stats = rk.token_stats(temperature=0.7, hidden=hidden, weight=weight, targets=P.targets)
        out = rk.sft_loss(z_loss=1e-4, targets=P.targets, weight=weight, hidden=hidden)
        return out.loss + stats.logp.sum() * 2, out.metrics

    assert_same(step, P.hidden, P.weight)


def test_the_references_bias_under_autocast():
    bias = torch.linspace(-1, 1, P.weight.shape[0])

    def step(hidden: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            head: dict[str, Any] = {"bias": bias, "ref_head": {"bias": bias}}
            kl = rk.kl_divergence(hidden, weight, REF_HIDDEN, REF_WEIGHT, P.targets, **head)
        return kl.sum(), {"kl": kl.detach()}

    assert_same(step, P.hidden, P.weight)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own look at it
def test_gradients_of_float16_are_scaled_before_they_are_rounded():
    """Before, what a loss scale would have saved is lost, and what it makes too large is infinite."""

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return rk.sft_loss(hidden, weight, P.targets, num_tokens=10**6).loss

    found = []
    for run in (step, torch.compile(step, backend="aot_eager")):
        leaves = [x.half().requires_grad_() for x in (P.hidden, P.weight)]
        (run(*leaves) * 65536.0).backward()
        found.append([x.grad for x in leaves])
    for a, b in zip(*found, strict=True):
        assert b is not None
        assert torch.equal(a, b)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="float16"):
        compiled(step)(*leaves)


@pytest.mark.parametrize("way", ["loss", "statistics"])
def test_second_derivatives_are_refused(way):
    def step(hidden: Tensor) -> Tensor:
        if way == "loss":
            return rk.sft_loss(hidden, P.weight, P.targets).loss
        return rk.token_stats(hidden, P.weight, P.targets).logp.sum()

    torch._dynamo.reset()
    hidden = P.hidden.clone().requires_grad_()
    (grad,) = torch.autograd.grad(torch.compile(step, backend="eager")(hidden), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only|no autograd formula"):
        grad.square().sum().backward()


def test_the_compiler_of_users():
    """Inductor, dynamic shapes and numbers that change from step to step: at most one graph for each kind of both."""
    torch._dynamo.reset()
    counters.clear()

    def step(hidden: Tensor, weight: Tensor, targets: Tensor, tokens: int, beta: float) -> tuple[Tensor, Tensor]:
        out = rk.sft_loss(torch.tanh(hidden), weight, targets, num_tokens=tokens, z_loss=beta)
        return out.loss, out.metrics["nll"]

    fast = torch.compile(step, fullgraph=True, backend="inductor")
    for n in (9, 12, 15, 17):
        found = []
        for fn in (step, fast):
            x, w = P.hidden[:n].clone().requires_grad_(), P.weight.clone().requires_grad_()
            loss, nll = fn(x, w, P.targets[:n], 3 * n, n / 100)
            loss.backward()
            found.append((loss.detach(), nll, w.grad, x.grad))
        for want, got in zip(*found, strict=True):
            assert torch.allclose(want, got)  # the compiler's tanh is not torch's
    assert counters["stats"]["unique_graphs"] <= 3
    assert not counters["graph_break"]


def test_no_gradient_is_computed_where_none_is_wanted():
    found = []
    step = compiled(lambda x, w: rk.token_stats(x, w, P.targets).entropy)
    with torch.no_grad():
        found.append(step(P.hidden.clone().requires_grad_(), P.weight))
    assert torch.equal(found[0], rk.token_stats(P.hidden, P.weight, P.targets).entropy)
    assert not found[0].requires_grad


def test_errors_are_the_same():
    step = compiled(lambda x, w, y: rk.sft_loss(x, w, y).loss)
    with pytest.raises(ValueError, match="targets: got"):
        step(P.hidden, P.weight, torch.full_like(P.targets, 10**6))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own look at it
@pytest.mark.parametrize(
    ("step", "why"),
    [
        (lambda x, w, g: rk.fused_loss(x, w, P.targets, lambda s, cu: (-s.logp.sum(), {})).loss, "objective"),
        (lambda x, w, g: rk.sft_loss(x, w, P.targets, weight_grad=g).loss, "weight_grad"),
    ],
    ids=["the caller's own objective", "a gradient in place"],
)
def test_one_break_that_says_why(step: Callable[..., Tensor], why: str):
    x, w, buffer = P.hidden.clone().requires_grad_(), P.weight.clone().requires_grad_(), torch.zeros_like(P.weight)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=why):
        compiled(step)(x, w, buffer)
    torch._dynamo.reset()
    counters.clear()
    loss = torch.compile(lambda x, w, g: step(x * 2.0, w, g) + 1.0, backend="aot_eager")(x, w, buffer)
    loss.backward()
    assert counters["stats"]["unique_graphs"] == 2, "what comes before, and what comes after"
    again = P.hidden.clone().requires_grad_()
    want = step(again * 2.0, w, torch.zeros_like(P.weight)) + 1.0
    want.backward()
    assert torch.equal(loss, want)
    assert x.grad is not None
    assert torch.equal(x.grad, again.grad)


def test_what_is_plain_torch_stays_in_the_graph_of_a_caller():
    x = torch.linspace(-1, 1, 6)
    for step in (lambda x: rk.whiten(x, checks=False), lambda x: rk.group_advantages(x, 2, checks=False)):
        assert torch.equal(compiled(step)(x), step(x))
