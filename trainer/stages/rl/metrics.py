"""Metrics of the RL loop by the names that PPO logs have had since 2019."""

from __future__ import annotations

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
        "loss/policy_avg": sum(h.get("policy", h.get("loss", 0.0)) for h in history) / len(history),
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
