"""What goes wrong in trainers that learn from their own responses, each named after its number in the design."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.rollouts import returns_of, world
from tests.support.small import lines, small_policy, small_scalar
from trainer.data.packing import Sample
from trainer.rewards.shaping import Scored
from trainer.sampling.rollout import Rollout
from trainer.stages.rl import ppo
from trainer.stages.rl import stage as rl_stage
from trainer.stages.rl.experience import Experience, collect


def collected(
    tmp_path: Path, beta: float = 0.0, **options: Any
) -> tuple[Experience | None, dict[str, float], torch.Tensor]:
    cfg = ppo.PPOConfig(data=tmp_path, reward="", **{"lam": 1.0, **options})
    policy, value = small_policy(), small_scalar()
    prompts = [[2, 3, 4], [5], [6, 7]] * 4
    scores = torch.linspace(1, 2, 12)
    batch, metrics, *_ = collect(
        cfg, policy, small_policy(seed=5), value, lambda *_: Scored(scores, {}), prompts, [{}] * 12,
        torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert batch is not None
    found, more = ppo.PPO(cfg).advantages(batch, beta)
    return found, metrics | more, scores


def test_pitfall_07_the_score_stands_on_the_last_response_token(tmp_path: Path) -> None:
    """With gamma 1/2 and no KL the return falls by half per token before the last one."""
    found, _, scores = collected(tmp_path, gamma=0.5, max_new_tokens=200)
    assert found is not None
    for i in range(12):
        part, returns = found.packed.select([i])[0], returns_of(found, i)
        assert int(part.targets[part.mask][-1]) == 1  # the last response token is the end of the sequence
        torch.testing.assert_close(returns, scores[i] * 0.5 ** torch.arange(len(returns) - 1, -1, -1))


def test_pitfall_08_advantages_are_those_of_the_double_sum(tmp_path: Path) -> None:
    """A_t = sum over k >= t of (gamma lam)^(k - t) delta_k, whitened over the whole rollout."""
    gamma, lam, beta = 0.9, 0.8, 0.2
    found, _, scores = collected(tmp_path, beta=beta, gamma=gamma, lam=lam, max_new_tokens=200)
    assert found is not None
    assert found.values is not None
    assert found.advantages is not None
    expected: list[float] = []
    for i in range(12):
        part = found.select([i])
        mask = part.packed.mask
        assert part.values is not None
        rewards = (-beta * (part.old_logp - part.ref_logp))[mask].double().tolist()
        rewards[-1] += float(scores[i])
        values = [*part.values[mask].double().tolist(), 0.0]
        delta = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
        mine = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))]
        torch.testing.assert_close(returns_of(found, i), torch.tensor(mine) + part.values[mask], rtol=1e-4, atol=1e-5)
        expected += mine
    raw = torch.tensor(expected, dtype=torch.float64)
    white = (raw - raw.mean()) / raw.std(unbiased=False)
    torch.testing.assert_close(found.advantages[found.packed.mask].double(), white, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("truncation", ["penalise", "bootstrap", "mask"])
def test_pitfall_08_truncated_and_ended_responses_differ_as_asked(truncation: str, tmp_path: Path) -> None:
    """The last return is the fixed score, or the score with the value of what would have followed."""
    found, metrics, scores = collected(tmp_path, max_new_tokens=12, truncation=truncation, truncation_score=-7.0)
    assert found is not None
    assert 0 < metrics["response/truncated"] < 1
    ended = [int(found.packed.input_ids[row]) == 1 for row in found.packed.last_rows]
    if truncation == "mask":
        assert all(ended)
        assert len(ended) == round(12 * (1 - metrics["response/truncated"]))
        return
    with torch.no_grad():
        follows = small_scalar().values(found.packed)[found.packed.last_rows]
    for i, stopped in enumerate(ended):
        cut = torch.tensor(-7.0) if truncation == "penalise" else scores[i] + follows[i]
        torch.testing.assert_close(returns_of(found, i)[-1], scores[i] if stopped else cut)


def test_pitfall_08_nothing_is_left_when_every_response_is_cut_and_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(policy: Any, prompts: list[list[int]], **_: Any) -> Rollout:
        return Rollout([Sample([*p, 5], len(p)) for p in prompts], [True] * len(prompts), [[0.0]] * len(prompts))

    monkeypatch.setattr("trainer.stages.rl.experience.sample", cut)
    found, metrics, _ = collected(tmp_path, truncation="mask")
    assert found is None
    assert metrics["response/truncated"] == 1
    rl_stage.ppo(ppo.PPOConfig(**world(tmp_path), truncation="mask"))
    assert [step["response/truncated"] for step in lines(tmp_path / "out" / "metrics.jsonl")] == [1, 1]


def test_pitfall_09_rewards_fall_by_the_kl_of_the_whole_response(tmp_path: Path) -> None:
    """Ouyang et al., equation 2: the return of a whole response is its score less beta times its log-ratio."""
    found, metrics, scores = collected(tmp_path, beta=0.3, max_new_tokens=200, temperature=1.5)
    assert found is not None
    policy, reference, kls = small_policy(), small_policy(seed=5), []
    for i in range(12):
        part = found.select([i])
        with torch.no_grad():
            logp, ref_logp = (m.stats(part.packed, 1.5).logp for m in (policy, reference))
        torch.testing.assert_close(part.old_logp, logp)
        kls.append(float((logp - ref_logp).sum()))
        assert returns_of(found, i)[0] == pytest.approx(float(scores[i]) - 0.3 * kls[-1], abs=1e-4)
    assert metrics["objective/kl"] == pytest.approx(sum(kls) / 12, rel=1e-4)


def test_pitfall_10_temperature_and_soft_cap_are_those_of_the_sampler(tmp_path: Path) -> None:
    """Log-probabilities of sampler, of training and of plain float64 arithmetic agree."""
    policy = small_policy()
    policy.parts = replace(policy.parts, constants={"softcap": 2.0})
    cfg = ppo.PPOConfig(data=tmp_path, reward="", temperature=0.6, max_new_tokens=20)
    batch, metrics, *_ = collect(
        cfg, policy, small_policy(seed=5), None, lambda *_: Scored(torch.zeros(3), {}), [[2, 3], [4], [5, 6, 7]],
        [{}] * 3, torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert metrics["rollout/sampler_delta"] < 1e-4
    assert batch is not None
    packed, mask = batch.packed, batch.packed.mask
    with torch.no_grad():
        z = policy.hidden(packed).double() @ policy.weight.double().T
    logp = torch.log_softmax(2.0 * torch.tanh(z / 2.0) / 0.6, -1)
    rows = mask.nonzero().squeeze(1)
    torch.testing.assert_close(batch.old_logp[mask].double(), logp[rows, packed.targets[mask]], rtol=1e-5, atol=1e-5)
    entropy = -(logp.exp() * logp).sum(-1)[mask]
    torch.testing.assert_close(batch.entropy[mask].double(), entropy, rtol=1e-5, atol=1e-5)
