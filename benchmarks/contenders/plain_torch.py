"""What torch itself offers: all logits, eagerly or compiled, and its own linear cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders.base import Build, LogpOf, LogpPeer, Own, Step, between, mark, mean_kl, mean_nll
from benchmarks.work.cases import Batch
from benchmarks.work.objectives import weighted
from benchmarks.work.truth import Result

EAGER, COMPILED, LINEAR = "torch, materialised", "torch.compile, materialised", "torch linear_cross_entropy"


def logp_of(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).float()  # logits in the model's dtype, then float32, as transformers does
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def score_of(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return stats_of(hidden @ weight.t(), targets)


def stats_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = logits.float().log_softmax(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def nll_of(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), targets)


def kl_of(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    logp = (hidden @ weight.t()).float().log_softmax(-1)
    with torch.no_grad():
        ref_logp = (ref_hidden @ ref_weight.t()).float().log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


@cache
def compiled(function: Callable) -> Callable:
    import torch._dynamo
    import torch._inductor.config

    # The kernels have room for so many threads, and what torch keeps of them on disk is not told apart by -1.
    torch._inductor.config.cpp.threads = torch.get_num_threads()
    # Past its limit torch.compile would quietly run eagerly, and be reported as what it is not.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False)


def _linear_mean() -> Callable[..., Tensor]:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("needs torch 2.13")
    return F.linear_cross_entropy


def _linear_logp() -> LogpOf:
    nll = _linear_mean()
    return lambda *head: -nll(*head, reduction="none").float()


def from_logits(load: Callable[[], Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]) -> Build:
    """Statistics of logits that are there, and the gradient of a weighted log-probability by them."""

    def build(batch: Batch) -> Step:
        assert batch.logits is not None
        stats, logits, cuda = load(), batch.logits.detach().requires_grad_(), batch.logits.is_cuda

        def step() -> Result:
            start = mark(cuda)
            logp, entropy = stats(logits, batch.targets)
            loss = weighted(logp, None, batch)
            middle = mark(cuda)
            (grad,) = torch.autograd.grad(loss, logits)
            return Result(loss, logp, entropy, grad_logits=grad, forward_s=lambda: between(start, middle))

        return step

    return build


LOGP = (
    LogpPeer(EAGER, lambda: logp_of, lambda: score_of, leaves_out=("sft",)),
    LogpPeer(COMPILED, lambda: compiled(logp_of), lambda: compiled(score_of), compiles=True, leaves_out=("sft",)),
    LogpPeer(LINEAR, _linear_logp, most_logits=2**26, leaves_out=("sft",)),
)
LOSSES = {
    "sft": (
        Own(EAGER, mean_nll(lambda: nll_of)),
        Own(COMPILED, mean_nll(lambda: compiled(nll_of)), compiles=True),
        Own(LINEAR, mean_nll(_linear_mean)),
    ),
    "kl": (Own(EAGER, mean_kl(lambda: kl_of)), Own(COMPILED, mean_kl(lambda: compiled(kl_of)), compiles=True)),
    "logits": (
        Own(EAGER, from_logits(lambda: stats_of)),
        Own(COMPILED, from_logits(lambda: compiled(stats_of)), compiles=True),
    ),
}
