"""What the loop in ``trainer.rl`` shows of itself: metrics by their old names, and samples before and after."""

from __future__ import annotations

from typing import Any

from trainer.log import RunLog
from trainer.models import Policy
from trainer.prompt import Prompt
from trainer.rewards import responses_of
from trainer.rl_config import RLConfig
from trainer.rollout import sample
from trainer.stage import generator
from trainer.text import encode_prompts

NO_DIFFERENCE = {"policy/no_difference": 1.0, "frac_reward_zero_std": 1.0}
"""Of a rollout that leaves nothing to learn; it has no other metrics of an update."""


def named(history: list[dict[str, float]]) -> dict[str, float]:
    """Averages over the optimizer steps of one rollout, under the names that PPO logs have had since 2019."""
    if not history:
        return {}

    def mean(key: str) -> float:
        return sum(h.get(key, 0.0) for h in history) / len(history)

    ratio = mean("ratio")
    metrics = {
        "policy/approxkl_avg": mean("approx_kl"),
        "policy/clipfrac_avg": mean("clipfrac"),
        "policy/entropy_avg": mean("entropy"),
        "policy/grad_norm": mean("grad_norm"),
        "loss/policy_avg": mean("loss"),
        "val/ratio": ratio,
        "val/ratio_var": sum((h.get("ratio", 0.0) - ratio) ** 2 for h in history) / len(history),
        "val/ratio_first": history[0].get("ratio", 0.0),
        "lr": history[-1]["lr"],
        "skipped": history[-1]["skipped"] + history[-1].get("value/skipped", 0.0),
    }
    there = {
        "loss/value_avg": "value/loss",
        "val/clipfrac_avg": "value/clipfrac",
        "val/grad_norm": "value/grad_norm",
        "loss/ptx_avg": "ptx",
        "loss/kl_avg": "kl",
        "tolerance/lost": "tolerance/lost",
        "tolerance/dense": "tolerance/dense",
    }
    return metrics | {name: mean(key) for name, key in there.items() if any(key in h for h in history)}


def show(cfg: RLConfig, log: RunLog, policies: dict[str, Policy], prompts: list[str]) -> None:
    """What a few prompts get from each policy, by the same random numbers."""
    shown: list[dict[str, Any]] = [{"prompt": p.plain if isinstance(p, Prompt) else p} for p in prompts]
    for name, policy in policies.items():
        tokens = encode_prompts(policy.tokenizer, prompts, cfg.max_length - cfg.max_new_tokens)
        source = generator(cfg, 3, policy.weight.device)
        rollout = sample(policy, tokens, max_new_tokens=cfg.max_new_tokens, generator=source)
        for row, text in zip(shown, responses_of(rollout, policy.tokenizer), strict=True):
            row[name] = text
    log.samples("Before and after", shown)
