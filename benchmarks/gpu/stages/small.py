"""Every GPU kernel once on small, ragged shapes, for compute-sanitizer, which slows a kernel a hundredfold.

python -m benchmarks.gpu.stages.small            # --few: one dtype and one size, for Triton's interpreter
"""

from __future__ import annotations

import sys

import torch

import rlhf_kernels as rk
from rlhf_kernels.backends import triton as backend
from rlhf_kernels.backends.triton import table


def head(dtype: torch.dtype, size: int, device: str, n: int, vocab: int) -> None:
    """All statistics and gradients, with all that a head can have."""
    rng = torch.Generator(device).manual_seed(0)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, device=device).to(dtype)

    hidden, weight, bias = new(n, size).requires_grad_(), new(vocab, size).requires_grad_(), new(vocab)
    targets = torch.randint(vocab, (n,), generator=rng, device=device)
    targets[::5] = -100
    options = {"backend": "triton", "bias": bias, "softcap": 20.0, "temperature": torch.ones(n, device=device)}
    stats = rk.token_stats(hidden, weight, targets, **options)
    kl = rk.kl_divergence(hidden, weight, new(n, size), new(vocab, size), targets, backend="triton")
    given = rk.token_stats_from_logits(new(n, vocab).requires_grad_(), targets, backend="triton")
    (stats.logp.sum() + stats.entropy.sum() + kl.sum() + given.logp.sum()).backward()
    old, advantages = torch.zeros(n, device=device), torch.randn(n, generator=rng, device=device)
    rk.ppo_loss(hidden, weight, targets, old, advantages, backend="triton").loss.backward()


def sparse(dtype: torch.dtype, device: str) -> None:
    """A tolerance, with rows of both kinds."""
    n, vocab, size = 40, 301, 37
    rng = torch.Generator(device).manual_seed(0)
    hidden, weight = (torch.randn(m, size, generator=rng, device=device) for m in (n, vocab))
    hidden[::3] *= 0.01  # flat
    x, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    targets = torch.randint(vocab, (n,), generator=rng, device=device)
    out = rk.sft_loss(x, w, targets, backend="triton", tolerance=0.05)
    out.loss.backward()
    assert 0 < out.metrics["tolerance/dense"] < 1, "both ways are to run"


def main(few: bool = False) -> None:
    device = "cpu" if backend.INTERPRETED else "cuda"
    if backend.INTERPRETED:
        from tests.gpu.interpret import shim

        shim.install()
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    listed = table.entry(torch.device(device))
    # sizes with and without tensor descriptors; what float16 and float32 share with bfloat16 runs once
    for way, cases in {
        "fused": [(bf16, 64)] if few else [(bf16, 64), (bf16, 37)],
        "strips": [(bf16, 64)] if few else [(bf16, 64), (fp16, 64), (fp32, 37)],
    }.items():
        here = listed.by(way)
        backend.entry = lambda device, here=here: here
        for dtype, size in cases:
            head(dtype, size, device, *((6, 131) if few else (70, 517)))
    for dtype in [bf16] if few else [bf16, fp32]:
        sparse(dtype, device)
    n = 50 if few else 5000
    cu_seqlens = torch.tensor([0, 1, 1, n // 7, n], device=device)
    mask = torch.arange(n, device=device) % 7 != 0
    rewards, values = torch.randn(n, device=device) * mask, torch.randn(n, device=device)
    rk.gae(rewards, values, cu_seqlens, mask=mask, bootstrap=torch.randn(4, device=device), whiten=True)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main("--few" in sys.argv[1:])
