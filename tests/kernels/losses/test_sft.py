"""Where trainers disagree about supervised fine-tuning: each test says which meaning we chose, and why."""

from __future__ import annotations

import torch.nn.functional as F

import rlhf_kernels as rk
from tests.support.identity_head import EYE, rows, same


def test_label_smoothing_spreads_over_the_whole_vocabulary():
    """Szegedy et al.: eps goes to all V tokens, the target included, as in torch's own cross-entropy."""
    x, y, _ = rows()
    same(rk.sft_loss(x, EYE, y, label_smoothing=0.3), F.cross_entropy(x, y, label_smoothing=0.3), x)
    z = F.cross_entropy(x, y) + 0.02 * x.logsumexp(-1).square().mean()
    same(rk.sft_loss(x, EYE, y, z_loss=0.02), z, x)
