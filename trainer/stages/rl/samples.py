"""What a few prompts get before the training and after it, for the log."""

from __future__ import annotations

from typing import Any

from trainer.data.encoding import encode_prompts
from trainer.data.prompt import Prompt
from trainer.models.policy import Policy
from trainer.rewards.sources import responses_of
from trainer.run.log import RunLog
from trainer.sampling.rollout import sample
from trainer.stages.rl.options import RLConfig
from trainer.training.seeds import generator


def show_samples(cfg: RLConfig, log: RunLog, policies: dict[str, Policy], prompts: list[str]) -> None:
    """What a few prompts get from each policy, by the same random numbers."""
    shown: list[dict[str, Any]] = [{"prompt": p.plain if isinstance(p, Prompt) else p} for p in prompts]
    for name, policy in policies.items():
        tokens = encode_prompts(policy.tokenizer, prompts, cfg.max_length - cfg.max_new_tokens)
        source = generator(cfg, 3, policy.weight.device)
        rollout = sample(policy, tokens, max_new_tokens=cfg.max_new_tokens, generator=source)
        for row, text in zip(shown, responses_of(rollout, policy.tokenizer), strict=True):
            row[name] = text
    log.samples("Before and after", shown)
