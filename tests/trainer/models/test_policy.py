"""Models of transformers as policies: whatever follows their head, in every part of the trainer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers

from tests.support.runs import config, finished, train, world
from tests.support.small import ragged, small_policy
from tests.trainer.models.test_trial import COMMON, family, saved
from trainer.data.packing import pack
from trainer.models.loading import load_policy, load_scalar
from trainer.models.policy import Policy, frozen, scalar_from
from trainer.sampling.rollout import sample
from trainer.stages.rl.shared_value import SharedValue
from trainer.training.defaults import decided
from trainer.training.optimizer import Optimizer
from trainer.training.progress import Progress
from trainer.training.state import Mark, Restored

# What follows the head, and whether its weight is that of the embedding.
FAMILIES: dict[str, tuple[set[str], bool]] = {
    "gemma3_text": ({"softcap"}, True),
    "nanochat": ({"softcap"}, False),
    "granitemoe": ({"logit_scale"}, False),
    "hyperclovax": ({"logit_scale"}, False),
    "cohere2": ({"logit_scale"}, True),
    "phi": ({"bias"}, False),
    "roc_bert": ({"bias"}, True),  # with a transform between backbone and head
    "deepseek_v2": (set(), False),  # values are narrower than keys
    "deepseek_v3": (set(), False),
    "minicpm3": (set(), True),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_gives_its_own_logits_packed_and_sampled(name: str, tmp_path: Path) -> None:
    model = family(name)
    policy = load_policy(saved(tmp_path, model))
    options, tied = FAMILIES[name]
    assert set(policy.head) == options
    assert (policy.weight is policy.model.get_input_embeddings().weight) == tied
    samples = ragged(5, longest=12)
    packed = pack(samples)
    with torch.no_grad():
        own = torch.cat([model(input_ids=torch.tensor([s.tokens])).logits[0] for s in samples])
        hidden = policy.hidden(packed)
        tolerance = {"rtol": 1e-4, "atol": 1e-4 * float(own.std())}
        assert float(own.std()) > 0.1
        torch.testing.assert_close(policy.logits(hidden), own, **tolerance)
        own_logp = torch.log_softmax(own, -1)[packed.mask].gather(1, packed.targets[packed.mask, None])[:, 0]
        torch.testing.assert_close(policy.stats(packed).logp[packed.mask], own_logp, **tolerance)
        said = sample(policy, [[2, 3, 4], [5]], max_new_tokens=4, generator=torch.Generator().manual_seed(0))
        assert said.sampler_delta(said.pack("cpu"), policy.stats(said.pack("cpu")).logp) < 1e-4


@pytest.mark.parametrize("name", ["gemma3_text", "roc_bert"])
def test_copies_and_checkpoints_have_parts_of_their_own(name: str, tmp_path: Path) -> None:
    @dataclasses.dataclass
    class State(Progress):
        policy: Policy
        optimizer: Optimizer

    policy, packed = Policy(family(name), None), pack(ragged(4, longest=9))
    with torch.no_grad():
        before = policy.stats(packed).logp
    copied = frozen(policy)
    assert copied.parts.model is copied.model is not policy.model
    cfg = config("sft", tmp_path, tmp_path)
    state = State(policy, Optimizer(decided(cfg), policy, 4))
    mark = Mark(state)
    kept = {name: {k: x.clone() for k, x in file.items()} for name, file in mark.tensors().items()}
    policy.stats(packed).logp.sum().backward()
    assert policy.weight.grad is not None
    assert copied.weight.grad is None
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
        assert not torch.allclose(policy.stats(packed).logp, before, atol=1e-3)
        assert torch.equal(copied.stats(packed).logp, before)
        Restored(mark.plain(), kept.__getitem__, torch.device("cpu")).into(state)
        assert torch.equal(policy.stats(packed).logp, before)


def test_a_tied_and_capped_model_goes_through_ppo_and_comes_back(tmp_path: Path) -> None:
    """With demonstrations mixed in, a value head on its backbone, and a value model of its own beside it."""
    path = world(tmp_path / "world")
    model = transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**COMMON | {"vocab_size": 22}, head_dim=8, final_logit_softcapping=3.0)
    )
    Policy(model, small_policy().tokenizer).save(path / "base" / "model")
    for stage in ("ppo", "shared"):
        cfg = config(stage, path, tmp_path / stage, steps=1)
        train(cfg)
        finished(cfg.out)
        policy, value, packed = load_policy(str(cfg.out)), load_scalar(str(cfg.out / "value")), pack(ragged(3))
        assert policy.head == {"softcap": 3.0}
        assert policy.weight is policy.model.get_input_embeddings().weight
        with torch.no_grad():
            assert not torch.allclose(policy.weight, model.get_output_embeddings().weight)
            if stage == "shared":
                torch.testing.assert_close(value.values(packed), value.head(policy.hidden(packed)).squeeze(-1))


def test_a_scalar_model_has_the_backbone_and_a_shared_value_wants_nothing_more() -> None:
    policy, packed = Policy(family("phi"), None), pack(ragged(3))
    scalar = scalar_from(policy)
    with torch.no_grad():
        torch.testing.assert_close(scalar.values(packed), scalar.head(policy.hidden(packed)).squeeze(-1))
    with pytest.raises(ValueError, match="value_model: got shared, want a model of its own: RoCBertForCausalLM has"):
        SharedValue(Policy(family("roc_bert"), None))
