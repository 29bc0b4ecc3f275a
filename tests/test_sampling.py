"""What the sampler says it did, and what is made of it where sampler and trainer differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rl_worlds import experience, gradient, world
from tests.trainer_worlds import lines, ragged, small_policy
from trainer import grpo, ppo, rollout
from trainer.experience import importance
from trainer.nucleus import nucleus
from trainer.packing import Sample, pack
from trainer.rl import Totals
from trainer.rollout import Rollout, _continue, sample


def test_the_log_probabilities_of_the_sampler_stand_in_the_rows_of_their_tokens() -> None:
    rollout = Rollout([Sample([2, 3, 4, 5], 2), Sample([6, 7], 1)], [False, False], [[-1.0, -2.0], [-3.0]])
    packed = rollout.pack("cpu")
    assert rollout.logp_of(packed).tolist() == [0, -1, -2, 0, -3, 0]
    assert rollout.sampler_delta(packed, torch.tensor([9.0, -1.5, -2.0, 9.0, -3.25, 9.0])) == 0.5


@pytest.mark.parametrize("sampler", ["cached", "generate"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_sampler_draws_from_the_policy_it_reports(temperature: float, sampler: Any) -> None:
    """First tokens of many responses to one prompt come as often as their reported probability says."""
    policy, source = small_policy(), torch.Generator().manual_seed(0)
    rollout = sample(
        policy, [[2, 3]] * 4000, max_new_tokens=1, generator=source, temperature=temperature, sampler=sampler
    )
    first = torch.tensor([rollout.response(i)[0] for i in range(4000)])
    with torch.no_grad():
        logits = policy.logits(policy.hidden(pack([Sample([2, 3], 2)]))[-1:])[0] / temperature
    p = torch.softmax(logits, -1)
    error = (torch.bincount(first, minlength=len(p)) / 4000 - p).abs()
    assert bool((error < 5 * (p * (1 - p) / 4000).sqrt() + 1e-3).all())
    reported = torch.tensor([x[0] for x in rollout.sampler_logp])
    torch.testing.assert_close(reported, p.log()[first], rtol=1e-4, atol=1e-4)


def test_the_first_batch_draws_from_the_generator_and_the_others_from_their_own() -> None:
    """A batch says the same whatever happens in the others, and no two of them draw the same numbers."""
    policy, one = small_policy(), [[2, 3]] * 6
    alone, source = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    tokens, logp = _continue(policy, one, 7, alone, 1.0, 1.0)
    whole = sample(policy, one, max_new_tokens=7, generator=source)
    for i in range(6):
        said = whole.response(i)
        assert (tokens[i, : len(said)].tolist(), logp[i, : len(said)].tolist()) == (said, whole.sampler_logp[i])
    assert torch.equal(alone.get_state(), source.get_state())

    def spoken(prompts: list[list[int]]) -> list[list[int]]:
        found = sample(policy, prompts, max_new_tokens=7, generator=torch.Generator().manual_seed(1), batch_size=6)
        return [found.response(i) for i in range(len(prompts))]

    three = spoken(one * 3)
    assert three[:6] != three[6:12] != three[12:] != three[:6]
    assert spoken([[4, 5]] * 6 + one + one)[6:] == three[6:]


def test_the_configuration_says_how_many_are_sampled_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counted(policy: Any, prompts: Any, *rest: Any) -> Any:
        seen.append(len(prompts))
        return _continue(policy, prompts, *rest)

    monkeypatch.setattr(rollout, "_continue", counted)
    cfg = ppo.PPOConfig(**world(tmp_path) | {"steps": 1}, sample_batch=4)
    ppo.train(cfg)
    assert seen[:3] == [4, 4, 2]
    with pytest.raises(ValueError, match="sample_batch: got 0, want at least 1"):
        ppo.train(replace(cfg, sample_batch=0))


def test_the_nucleus_holds_the_likeliest_tokens_and_no_more() -> None:
    logp = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.97, 0.01, 0.01, 0.01]]).log()
    torch.testing.assert_close(
        nucleus(logp, 0.7).exp(), torch.tensor([[0, 4 / 7, 3 / 7, 0], [1, 0, 0, 0]]), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(nucleus(logp, 0.71).exp()[0], torch.tensor([0, 4 / 9, 3 / 9, 2 / 9]))
    policy, source = small_policy(), torch.Generator().manual_seed(0)
    rollout = sample(policy, [[2, 3]] * 500, max_new_tokens=1, generator=source, top_p=0.3)
    with torch.no_grad():
        p = torch.softmax(policy.logits(policy.hidden(pack([Sample([2, 3], 2)]))[-1:])[0], -1)
    least = min(float(p[rollout.response(i)[0]]) for i in range(500))
    assert float(p[p > least].sum()) < 0.3 < float(p[p >= least].sum()) + 1e-6


def test_importance_weights_are_capped_and_their_effective_size_is_told() -> None:
    logp, mask = torch.tensor([-1.0, -1.0, -1.0, 7.0]), torch.tensor([True, True, True, False])
    sampler = torch.tensor([-1.0, -3.0, -0.5, -9.0])
    ratios = torch.tensor([1.0, 2.718281828**2, 2.718281828**-0.5], dtype=torch.float64)
    weight, metrics = importance(logp, sampler, mask, 2.0)
    capped = ratios.clamp(max=2.0)
    assert weight is not None
    torch.testing.assert_close(weight[:3].double(), capped, rtol=1e-6, atol=1e-6)
    assert metrics == pytest.approx(
        {
            "sampling/importance_ratio_min": float(ratios.min()),
            "sampling/importance_ratio_max": float(ratios.max()),
            "sampling/ess": float(capped.sum() ** 2 / (3 * capped.square().sum())),
            "sampling/capped": 1 / 3,
        }
    )
    weight, metrics = importance(logp, sampler, mask, None)
    assert weight is None
    assert metrics["sampling/ess"] == pytest.approx(float(ratios.sum() ** 2 / (3 * ratios.square().sum())))


def test_importance_weights_weigh_the_policy_loss_and_nothing_else(tmp_path: Path) -> None:
    """Twice the weight on some tokens is twice their share of the gradient; denominators stay."""
    batch, policy = experience(ragged(6)), small_policy()
    method = grpo.GRPO(grpo.GRPOConfig(data=tmp_path, reward=""))
    totals = Totals(int(batch.packed.mask.sum()), 6)
    some = torch.arange(len(batch.old_logp)) % 3 == 0
    flats = []
    for weight in (None, torch.where(some, 2.0, 1.0), some.float()):
        part = replace(batch, token_weight=weight).parts(range(6), 10_000)[0]
        method.policy_loss(policy, part, totals, 0.1).loss.backward()
        flats.append(gradient(policy))
    assert flats[2].norm() > 1e-4
    torch.testing.assert_close(flats[1] - flats[0], flats[2], rtol=1e-3, atol=1e-5)


def test_a_sampler_that_agrees_changes_nothing_to_speak_of(tmp_path: Path) -> None:
    options: dict[str, Any] = world(tmp_path)
    seen = []
    for cap in (None, 2.0):
        options["out"] = tmp_path / str(cap)
        ppo.train(ppo.PPOConfig(**options, importance_cap=cap))
        seen.append(lines(options["out"] / "metrics.jsonl"))
    for without, capped in zip(*seen, strict=True):
        assert without["sampling/ess"] == pytest.approx(1, abs=1e-6)
        assert "sampling/capped" not in without
        assert capped["sampling/capped"] == 0
        assert capped["loss/policy_avg"] == pytest.approx(without["loss/policy_avg"], rel=1e-2, abs=1e-4)


def test_both_samplers_agree_with_the_training_forward_and_with_each_other() -> None:
    """Prompts of several lengths, responses that end and responses that are cut."""
    policy, prompts = small_policy(), [[2, 3, 4, 5, 6], [7], [8, 9, 10]] * 3
    policy.model.generation_config.repetition_penalty = 5.0  # what a model suggests for chats is not the policy
    before = torch.random.get_rng_state()
    seen = []
    for sampler in ("cached", "generate"):
        source = torch.Generator().manual_seed(3)
        for temperature, top_p in ((1.3, 1.0), (1.0, 0.8)):
            rollout = sample(
                policy, prompts, max_new_tokens=12, generator=source, temperature=temperature, top_p=top_p,
                sampler=sampler,  # type: ignore[arg-type]
            )  # fmt: skip
            assert any(rollout.truncated)
            assert not all(rollout.truncated)
            packed = rollout.pack("cpu")
            with torch.no_grad():
                logp = policy.stats(packed, temperature).logp
            if top_p == 1:
                assert rollout.sampler_delta(packed, logp) < 1e-4
            else:
                assert bool((rollout.logp_of(packed) >= logp - 1e-4)[packed.mask].all())
        greedy = sample(policy, prompts, max_new_tokens=9, generator=source, temperature=0, sampler=sampler)  # type: ignore[arg-type]
        seen.append(greedy)
    assert seen[0].samples == seen[1].samples
    for mine, theirs in zip(seen[0].sampler_logp, seen[1].sampler_logp, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    assert torch.equal(torch.random.get_rng_state(), before)
    again = [
        sample(
            policy, prompts, max_new_tokens=5, generator=torch.Generator().manual_seed(s), sampler="generate"
        ).samples
        for s in (1, 1, 2)
    ]
    assert again[0] == again[1] != again[2]
