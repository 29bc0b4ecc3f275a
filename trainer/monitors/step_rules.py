"""Rules about single updates: one that went too far, one that had nothing to learn from, rewards that do not count."""

from __future__ import annotations

from trainer.monitors.history import Found, History, Thresholds

ALL_CUT_OFF = 0.95
ALWAYS = 1.0  # the value of a signal that says yes


def update(seen: History, t: Thresholds) -> Found | None:
    """One update moved the policy further than its loss can vouch for. A first one can ruin a model: no patience."""
    last, found = seen.last, ""
    if (kl := max(last.get("step_kl", 0.0), last.get("step_after", 0.0))) > t.step_kl:
        found = f"it moved the policy {kl:.2g} nats per token from the one that sampled, more than {t.step_kl:g}"
    elif abs((ratio := last.get("step_ratio", 1.0)) - 1) > t.step_ratio:
        found = f"the mean ratio of new to old probabilities is {ratio:.3g}, which is one in expectation"
    elif abs(loss := last.get("step_loss", 0.0)) > t.step_loss:
        found = f"the policy's loss is {loss:.3g}, where advantages have a deviation of about one"
    if not found:
        return None
    return Found(
        f"an update went too far: {found}. Lower lr (to a tenth), take fewer epochs or minibatches, or a longer "
        "warm-up; begin again from the model as it was, and read some samples.",
        at_once=True,
    )


def no_difference(seen: History, t: Thresholds) -> Found | None:
    """Rollout after rollout leaves nothing to learn, because the responses to a prompt all score alike."""
    if seen.last.get("no_difference") != ALWAYS:
        return None
    mean = seen.last.get("proxy", 0.0)
    alike = f"all answers score alike: {mean:g}"
    if seen.last.get("proxy_se", 0.0) > 0:
        alike = f"all answers to the same prompt score alike (their mean is {mean:.3g})"
    return Found(
        f"{alike}. Such a rollout takes no step, and nothing is learnt. Read some samples; look whether the reward "
        "understands the answers (exact_answer wants a number), whether max_new_tokens leaves room for them, and "
        "whether the model ever gets it right. Easier prompts, more num_generations or a reward with more shades help."
    )


def truncation(seen: History, t: Thresholds) -> Found | None:
    """Responses are cut off, so that their end is never rewarded, or not even what they say."""
    last, now = seen.last.get("truncated"), seen.smooth("truncated", t.window)
    if last is None or now is None:
        return None
    ignored = seen.last.get("ignored", 0.0)
    if ignored >= t.ignored:
        return Found(
            f"the reward is being ignored: {ignored:.0%} of the responses were cut off by the limit, and with "
            f"truncation=penalise each of them gets one fixed score in place of its own, so that "
            f"{'nothing' if ignored == 1 else 'little'} of the reward is left. Raise max_new_tokens (responses have "
            f"{seen.last.get('length', 0.0):.0f} tokens on average), or set truncation=bootstrap (ppo) or "
            "truncation=keep (grpo) if a cut response is worth something.",
            at_once=True,
        )
    if seen.updates == 1 and last >= ALL_CUT_OFF:
        return Found(
            f"{last:.0%} of the responses were cut off by the limit, so that no end is ever rewarded. Raise "
            "max_new_tokens, or start from a model that ends its responses.",
            at_once=True,
        )
    if now > t.truncated:
        return Found(
            f"{now:.0%} of the responses are cut off by the limit. Raise max_new_tokens, or penalise truncation more."
        )
    return None
