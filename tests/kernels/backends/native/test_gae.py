"""GAE in C++ against the textbook loop in float64."""

from __future__ import annotations

import pytest
import torch

from tests.support.native_oracle import draw, plain_gae

pytest.importorskip("rlhf_kernels._C", reason="the extension is not built")

from rlhf_kernels.backends import native


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [[7], [0, 1, 0, 5, 300, 2, 2, 0], [3] * 41, []], ids=len)
def test_gae(lengths: list[int], masked: bool, dtype: torch.dtype) -> None:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    rewards, values = draw(int(ends[-1]), seed=1, dtype=dtype), draw(int(ends[-1]), seed=2, dtype=dtype)
    mask = draw(int(ends[-1]), seed=3) > -0.3 if masked else None
    bootstrap = draw(len(lengths), seed=4, dtype=dtype) if masked else None
    got = native.gae(rewards, values, ends, mask, bootstrap, 0.97, 0.9)
    for x, want in zip(got, plain_gae(rewards, values, ends, mask, bootstrap, 0.97, 0.9), strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), want, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=1e-7)
        assert mask is None or not x[~mask].any()


def test_gae_repeats_on_any_number_of_threads() -> None:
    ends = torch.tensor([0, 900, 901, 1400, 1400, 5000])
    rewards, values, mask = draw(5000, seed=1), draw(5000, seed=2), draw(5000, seed=3) > 0
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(native.gae(rewards, values, ends, mask, None, 0.99, 0.95))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
