"""GRPO and its relatives on the one loop, PPO-ptx, and the KL as a term of the loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rlhf_kernels as rk
from tests import fault_worlds
from tests.fault_worlds import Stopper
from tests.rl_worlds import experience, gradient, returns_of, world
from tests.trainer_worlds import lines, ragged, small_policy, write
from trainer import grpo, ppo
from trainer.models import Policy, load_policy, load_scalar
from trainer.packing import pack
from trainer.rl import Loop, Totals
from trainer.shared_value import SharedValue
from trainer.text import encode_pairs


@pytest.mark.parametrize("train", ["ppo", "grpo"])
def test_pitfall_23_ptx_with_coefficient_zero_is_bitwise_without(train: str, tmp_path: Path) -> None:
    options: dict[str, Any] = world(tmp_path)
    rows = [{"prompt": "b", "response": "c d e"}, {"prompt": "f g", "response": "h"}, {"prompt": "e", "response": "a"}]
    texts = write(tmp_path / "texts.jsonl", rows)
    models, logs = [], []
    for name, ptx in {
        "without": {}, "zero": {"ptx_coef": 0.0, "ptx_data": texts}, "one": {"ptx_coef": 1.0, "ptx_data": texts},
    }.items():  # fmt: skip
        options["out"] = tmp_path / name
        if train == "ppo":
            ppo.train(ppo.PPOConfig(**options, **ptx, ptx_batch_size=2))
        else:
            grpo.train(grpo.GRPOConfig(**options, **ptx, ptx_batch_size=2, num_generations=2))
        models.append((options["out"] / "model" / "model.safetensors").read_bytes())
        logs.append(lines(options["out"] / "metrics.jsonl"))
    assert models[0] == models[1] != models[2]
    assert "loss/ptx_avg" not in logs[1][0]
    assert 2 < logs[2][0]["loss/ptx_avg"] < 4  # a random model over 22 tokens: 3.1
    # The policy's own loss is logged without it; the first update had yet to move anything.
    assert logs[2][0]["objective/scores"] == logs[0][0]["objective/scores"]


def test_ptx_adds_its_coefficient_times_the_language_model_loss(tmp_path: Path) -> None:
    """Ouyang et al., equation 2, in the gradient of one optimizer step, over several micro-batches of either kind."""
    options: dict[str, Any] = world(tmp_path) | {"epochs": 1, "minibatches": 1, "max_grad_norm": 1e9}
    rows = [{"prompt": "b", "response": "c d e"}, {"prompt": "f g", "response": " ".join("hij" * 10)}] * 3
    options |= {"ptx_data": write(tmp_path / "texts.jsonl", rows), "ptx_batch_size": 6, "max_tokens": 40}
    found: list[torch.Tensor] = []
    for coef in (0.0, 0.25):
        cfg = ppo.PPOConfig(**options, ptx_coef=coef)
        loop = Loop(cfg, ppo.PPO(cfg), print)
        policy = loop.state.policy

        def taken(policy: Policy = policy) -> None:
            found.append(torch.cat([p.grad.flatten().clone() for p in policy.parameters() if p.grad is not None]))

        loop.state.optimizers["policy"].adam.step = taken  # type: ignore[method-assign, assignment]
        loop.rollout()
        assert loop.minibatch()
    policy = small_policy(scale=1.0)
    demonstrations = encode_pairs(policy.tokenizer, [r["prompt"] for r in rows], [r["response"] for r in rows], 1024)
    packed = pack(demonstrations)
    (-0.25 * policy.stats(packed).logp.sum() / packed.mask.sum()).backward()
    wanted = gradient(policy)
    assert wanted.norm() > 1e-2
    assert (found[1] - found[0] - wanted).norm() <= 1e-5 * wanted.norm()


def by_hand(scores: torch.Tensor, baseline: str, scale: str) -> torch.Tensor:
    """Groups of four, one number per response."""
    groups = scores.view(-1, 4).double()
    mean = groups.mean(1, keepdim=True)
    if baseline == "leave_one_out":
        mean = (groups.sum(1, keepdim=True) - groups) / 3
    deviation = {
        "none": torch.tensor(1.0),
        "group_std": groups.std(1, keepdim=True, unbiased=False) + 1e-6,
        "batch_std": groups.std(unbiased=False) + 1e-6,
    }[scale]
    return ((groups - mean) / deviation).flatten()


@pytest.mark.parametrize("scale", ["group_std", "batch_std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_group_advantages_are_those_of_the_papers(baseline: Any, scale: Any, kl_in: Any, tmp_path: Path) -> None:
    """One number on every token of a response; KL in the reward is taken off the score before it is compared."""
    samples = ragged(8)
    batch = experience(samples)
    noise = torch.randn(len(batch.old_logp), generator=torch.Generator().manual_seed(5))
    batch = replace(batch, ref_logp=batch.old_logp + noise.where(batch.packed.mask, 0.0))
    cfg = grpo.GRPOConfig(data=tmp_path, reward="", num_generations=4, baseline=baseline, scale=scale, kl_in=kl_in)
    found, metrics = grpo.GRPO(cfg).advantages(batch, 0.3)
    assert found is not None
    assert found.advantages is not None
    kl = torch.stack([-x.sum() for x in noise.where(batch.packed.mask, 0.0).split(batch.packed.lengths)])
    each = by_hand(batch.scores - 0.3 * kl if kl_in == "reward" else batch.scores, baseline, scale)
    for want, mine, mask in zip(
        each, found.advantages.split(batch.packed.lengths), batch.packed.mask.split(batch.packed.lengths), strict=True
    ):
        torch.testing.assert_close(mine.double(), torch.where(mask, want, 0.0), rtol=1e-4, atol=1e-5)
    assert metrics["objective/kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert metrics["frac_reward_zero_std"] == 0
    level = grpo.GRPO(cfg).advantages(replace(batch, scores=torch.tensor([1.0] * 4 + [0, 1, 1, 1])), 0.0)
    assert level[1]["frac_reward_zero_std"] == 0.5
    assert level[0] is not None
    assert not level[0].select(range(4)).advantages.any()  # type: ignore[union-attr]


def test_reinforce_plus_plus_whitens_what_is_left_to_be_earned(tmp_path: Path) -> None:
    """Return of token t: the score less beta times the KL from t on; then mean 0 and variance 1 over all tokens."""
    batch = experience(ragged(6))
    mask, beta = batch.packed.mask, 0.2
    cfg = grpo.GRPOConfig(
        data=tmp_path, reward="", num_generations=1, baseline="batch", scale="batch_std", kl_in="reward"
    )
    found, _ = grpo.GRPO(cfg).advantages(batch, beta)
    assert found is not None
    assert found.advantages is not None
    ahead = []
    for i, lengths in enumerate(m.sum() for m in mask.split(batch.packed.lengths)):
        left = torch.arange(int(lengths), 0, -1)  # every token costs 0.1 nats
        ahead.append(batch.scores[i] - beta * 0.1 * left)
    flat = torch.cat(ahead).double()
    white = (flat - flat.mean()) / flat.std(unbiased=False)
    torch.testing.assert_close(found.advantages[mask].double(), white, rtol=1e-4, atol=1e-4)
    for bad, message in (
        ({"scale": "group_std"}, "which knows no groups"),
        ({"baseline": "mean", "num_generations": 1}, "num_generations: got 1, want at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            grpo.GRPO(replace(cfg, **bad))  # type: ignore[arg-type]


def test_the_kl_in_the_loss_pulls_to_the_reference_and_leaves_rewards_alone(tmp_path: Path) -> None:
    cfg = ppo.PPOConfig(data=tmp_path, reward="", kl_in="loss", kl="k2", lam=1.0)
    method, policy, batch = ppo.PPO(cfg), small_policy(), experience(ragged(6))
    found, metrics = method.advantages(batch, 5.0)
    assert found is not None
    assert metrics["objective/kl_coef"] == 5.0
    for i in range(6):
        if len(returns := returns_of(found, i)):
            torch.testing.assert_close(returns, batch.scores[i].expand(len(returns)))
    totals = Totals(int(batch.packed.mask.sum()), 6)
    flats = []
    for beta in (0.0, 2.0):
        method.policy_loss(policy, found, totals, beta).loss.backward()
        flats.append(gradient(policy))
    packed, mask = batch.packed, batch.packed.mask
    logp = policy.stats(packed).logp
    (2.0 * 0.5 * (logp - batch.ref_logp).square()[mask].sum() / totals.tokens).backward()
    wanted = gradient(policy)
    assert (flats[1] - flats[0] - wanted).norm() <= 1e-4 * wanted.norm()


def test_grpo_learns_a_function_of_the_response(tmp_path: Path) -> None:
    options: dict[str, Any] = world(tmp_path) | {"steps": 20, "max_new_tokens": 6, "lr": 3e-3}
    grpo.train(grpo.GRPOConfig(**options, num_generations=4, kl_coef=0.01))
    scores = [step["objective/scores"] for step in lines(tmp_path / "out" / "metrics.jsonl")]
    assert sum(scores[-4:]) / 4 > 0.6 > 0.2 > scores[0]


def test_a_shared_backbone_gets_the_sum_of_both_gradients(tmp_path: Path) -> None:
    """One forward; loss and metrics are told apart; micro-batches change nothing."""
    cfg = ppo.PPOConfig(data=tmp_path, reward="", value_model="shared", value_coef=0.3, entropy_coef=0.1)
    batch, policy = experience(ragged(6)), small_policy()
    method = ppo.PPO(cfg)
    value = method.value_model(policy, [])
    assert isinstance(value, SharedValue)
    assert not value.values(batch.packed).any()
    torch.nn.init.normal_(value.head.weight, generator=torch.Generator().manual_seed(0))
    assert sum(p.numel() for p in value.parameters()) == 32
    totals, plain = Totals(int(batch.packed.mask.sum()), 6), ppo.PPO(replace(cfg, value_model=None))
    plain.policy_loss(policy, batch, totals, 0.0).loss.backward()
    assert batch.returns is not None
    apart = rk.value_loss(
        value.values(batch.packed), batch.returns, old_values=batch.values, clip=0.2, mask=batch.packed.mask,
        num_tokens=totals.tokens,
    )  # fmt: skip
    (0.3 * apart.loss).backward()
    square = float(apart.loss.detach())
    wanted = [gradient(policy), gradient(value)]
    for budget in (10_000, 60):
        parts, seen = batch.parts(range(6), budget), 0.0
        for part in parts:
            out = method.policy_loss(policy, part, totals, 0.0)
            out.loss.backward()
            seen += float(out.metrics["value/loss"]) * int(part.packed.mask.sum()) / totals.tokens
        assert seen == pytest.approx(square, rel=1e-5)
        for mine, want in zip((gradient(policy), gradient(value)), wanted, strict=True):
            assert want.norm() > 1e-3
            assert (mine - want).norm() <= 1e-5 * want.norm()


def test_ppo_learns_on_a_shared_backbone_and_leaves_a_value_model(tmp_path: Path) -> None:
    options: dict[str, Any] = world(tmp_path) | {"steps": 25, "batch_size": 40, "max_new_tokens": 6, "lr": 3e-3}
    ppo.train(ppo.PPOConfig(**options, value_model="shared", kl_coef=0.01, truncation="bootstrap"))
    steps = lines(tmp_path / "out" / "metrics.jsonl")
    scores = [step["objective/scores"] for step in steps]
    assert sum(scores[-4:]) / 4 > 0.7 > 0.2 > scores[0]
    assert all(step["loss/value_avg"] > 0 for step in steps)
    assert abs(steps[0]["loss/policy_avg"]) < 0.1
    packed = pack(ragged(3))
    policy, value = load_policy(str(tmp_path / "out")), load_scalar(str(tmp_path / "out" / "value"))
    with torch.no_grad():
        torch.testing.assert_close(value.values(packed), value.head(policy.hidden(packed)).squeeze(-1))
        assert value.values(packed).any()


def test_options_without_a_meaning_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    common: dict[str, Any] = {"data": tmp_path / "nowhere.jsonl", "reward": "", "out": tmp_path}
    options: list[tuple[dict[str, Any], str]] = [
        ({"clip": (-0.1, 0.2)}, r"clip: got \(-0.1, 0.2\)"),
        ({"kl_coef": -1.0}, "kl_coef: got -1.0, want zero or more"),
        ({"temperature": 0.0}, "temperature: got 0.0, want a positive number"),
        ({"epochs": 0}, "epochs: got 0, want at least 1"),
        ({"ptx_coef": 1.0}, "ptx_data: want a file of demonstrations"),
        ({"importance_cap": 0.5}, "importance_cap: got 0.5, want at least 1"),
        ({"lam": 1.5}, "lam: got 1.5, want a number from 0 to 1"),
        ({"value_clip": 0.0}, "value_clip: got 0.0, want a positive number"),
        ({"kl_target_per_seq": -6.0}, "kl_target_per_seq: got -6.0, want a positive number"),
    ]
    for bad, message in options:
        with pytest.raises(ValueError, match=message):
            ppo.train(ppo.PPOConfig(**common, **bad))
    with pytest.raises(ValueError, match=r"dual_clip: got 1.0, want a ratio above one"):
        grpo.train(grpo.GRPOConfig(**common, dual_clip=1.0))


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_tokens_are_averaged_as_named(reduction: Any, tmp_path: Path) -> None:
    """On-policy the loss is minus the mean advantage, whatever mean that is."""
    batch, policy = experience(ragged(6)), small_policy()
    packed, mask = batch.packed, batch.packed.mask
    with torch.no_grad():
        batch = replace(batch, old_logp=policy.stats(packed).logp)
    assert batch.advantages is not None
    cfg = grpo.GRPOConfig(data=tmp_path, reward="", reduction=reduction, kl_coef=0.0, max_new_tokens=50)
    out = grpo.GRPO(cfg).policy_loss(policy, batch, Totals(int(mask.sum()), 6), 0.0)
    each = [a[m] for a, m in zip(batch.advantages.split(packed.lengths), mask.split(packed.lengths), strict=True)]
    wanted = {
        "token_mean": torch.cat(each).mean(),
        "sequence_mean": torch.stack([x.mean() for x in each]).mean(),
        "sequence_sum": torch.stack([x.sum() for x in each]).mean(),
        "constant": torch.cat(each).sum() / (6 * 50),
    }[reduction]
    assert float(out.loss.detach()) == pytest.approx(-float(wanted), rel=1e-4)


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_pitfall_15_options_of_the_loop_survive_a_stop_at_every_safe_point(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared backbone, importance weights, transformers' sampler, an ensemble: the same bits as without a stop."""
    path, stopper = fault_worlds.world(tmp_path), Stopper(monkeypatch)
    reward = "tests.fault_worlds:early_letters"
    more: dict[str, Any] = {
        "reward": (f"{reward},{reward}", f"again={reward}@0.5"), "steps": 1, "importance_cap": 1.5,
        "sampler": "generate", "kl_target_per_seq": 0.01,
    }  # fmt: skip
    more |= {"value_model": "shared"} if stage == "ppo" else {"baseline": "batch", "scale": "none", "kl_in": "reward"}
    whole, pieces = (fault_worlds.config(stage, path, tmp_path / out, **more) for out in ("whole", "pieces"))
    fault_worlds.train(whole)
    assert fault_worlds.one_step_at_a_time(pieces, stopper) == (1 + 4 + 1) + 1
    assert fault_worlds.finished(whole.out) == fault_worlds.finished(pieces.out)
