"""What the demo measures: a policy's held-out responses before the hidden judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainer.base.statistics import Estimate, mean, proportion
from trainer.data.encoding import encode_prompts
from trainer.demo.task import Verdict, judge
from trainer.evaluation.win_rate import win_rate
from trainer.models.policy import Policy
from trainer.rewards.sources import responses_of
from trainer.sampling.rollout import Rollout, sample

MAX_NEW_TOKENS = 16


@dataclass(frozen=True)
class Judged:
    """Sampled responses to held-out prompts and the judge's verdicts on them."""

    prompts: list[str]
    responses: list[str]
    rollout: Rollout
    verdicts: list[Verdict]

    def first(self, count: int) -> Judged:
        """The first few of them."""
        rollout = self.rollout
        part = Rollout(rollout.samples[:count], rollout.truncated[:count], rollout.sampler_logp[:count])
        return Judged(self.prompts[:count], self.responses[:count], part, self.verdicts[:count])

    @property
    def scores(self) -> list[float]:
        return [v.score for v in self.verdicts]

    @property
    def judge(self) -> Estimate:
        """Mean of the judge's score."""
        return mean(self.scores)

    @property
    def exact(self) -> Estimate:
        """Share of responses with the words, and nothing but the words, in order."""
        return proportion(sum(v.exact for v in self.verdicts), len(self.verdicts))

    @property
    def clean(self) -> Estimate:
        """Share of responses with a polite opening and no oddities."""
        return proportion(sum(v.clean for v in self.verdicts), len(self.verdicts))

    @property
    def length(self) -> Estimate:
        """Mean tokens per response, the end included."""
        return mean([float(len(self.rollout.response(i))) for i in range(len(self.prompts))])

    def against(self, other: Judged) -> Estimate:
        """Share of prompts on which the judge prefers these responses; ties count half."""
        return win_rate(self.scores, other.scores)


def judged(policy: Policy, prompts: Sequence[str], seed: int) -> Judged:
    """Samples one response per prompt and asks the judge."""
    tokens = encode_prompts(policy.tokenizer, prompts, 64)
    source = torch.Generator(policy.weight.device).manual_seed(seed)
    rollout = sample(policy, tokens, max_new_tokens=MAX_NEW_TOKENS, generator=source)
    responses = responses_of(rollout, policy.tokenizer)
    verdicts = [judge(p, r, not t) for p, r, t in zip(prompts, responses, rollout.truncated, strict=True)]
    return Judged(list(prompts), responses, rollout, verdicts)
