"""The frozen reference says the same whenever it is asked, of the tokens that it knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.small import ragged, small_policy
from trainer.data.packing import pack
from trainer.models.tiny import byte_tokenizer, tiny_policy
from trainer.stages.preference import dpo
from trainer.stages.preference.reference import Reference, reference_model


def test_pitfall_04_the_reference_says_the_same_alone_packed_before_and_during_training(tmp_path: Path) -> None:
    policy, samples = small_policy(), ragged(7)
    cfg = dpo.DPOConfig(data=tmp_path, max_tokens=50)
    once, always = (Reference(cfg, policy, samples, once=once) for once in (True, False))
    assert once.model is None
    order = [3, 0, 6, 1]
    packed = pack([samples[i] for i in order])
    logp = once.logp(order, packed)
    torch.testing.assert_close(logp, always.logp(order, packed), rtol=1e-5, atol=1e-5)
    assert not logp[~packed.mask].any()
    for i, mine in zip(order, logp.split(packed.lengths), strict=True):
        alone = pack([samples[i]])
        with torch.no_grad():
            torch.testing.assert_close(mine, policy.stats(alone).logp, rtol=1e-5, atol=1e-5)


def test_references_with_other_tokens_are_refused(tmp_path: Path) -> None:
    tiny_policy(byte_tokenizer(["a b c d"], 300), 0, hidden=32).save(tmp_path / "bytes")
    with pytest.raises(ValueError, match="reference: want the tokenizer of the policy"):
        reference_model(small_policy(), str(tmp_path / "bytes"))
    small_policy(3).save(tmp_path / "other")
    packed = pack(ragged(3))
    with torch.no_grad():
        found = reference_model(small_policy(), str(tmp_path / "other"))
        assert torch.equal(found.stats(packed).logp, small_policy(3).stats(packed).logp)
    assert not any(p.requires_grad for p in found.parameters())
