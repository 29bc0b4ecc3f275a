"""FOLDER STAGE [STAGE ...]: short runs, one after the other, in each of the processes that torchrun starts.

At the end each of them samples, and leaves in FOLDER/sampled-RANK.json what it did, what it has, and what it heard.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.support.commands import command
from tests.support.small import ragged, small_policy
from trainer.base import ranks
from trainer.cli.program import main
from trainer.sampling import rollout

CASES = [("cached", 3), ("generate", 3), ("cached", 512)]  # samplers, and how many prompts in flight together
NAMES = {"cached": "_continue", "generate": "generated"}


def sampled(sampler: Any, batch_size: int) -> tuple[list[int], list[Any]]:
    """How many prompts this process continued, batch by batch; and the rollout, with the generator that it leaves."""
    seen: list[int] = []
    run, prompts = getattr(rollout, NAMES[sampler]), [s.tokens for s in ragged(10, longest=9)]

    def counted(policy: Any, prompts: Any, *rest: Any) -> Any:
        seen.append(len(prompts))
        return run(policy, prompts, *rest)

    source = torch.Generator().manual_seed(5)
    setattr(rollout, NAMES[sampler], counted)
    try:
        found = rollout.sample(
            small_policy(), prompts, max_new_tokens=6, generator=source, batch_size=batch_size, sampler=sampler
        )
    finally:
        setattr(rollout, NAMES[sampler], run)
    tokens = [found.response(i) for i in range(len(prompts))]
    return seen, [tokens, found.truncated, found.sampler_logp, source.get_state().tolist()]


def heard() -> str:
    """What comes of work that fails on the second of two ranks."""
    try:
        ranks.spread([4, 0], lambda x: 1 / x)
    except (RuntimeError, ZeroDivisionError) as error:
        return repr(error)
    return ""


if __name__ == "__main__":
    path = Path(sys.argv[1])
    for stage in sys.argv[2:]:
        if main(command(stage, path, path / f"spread-{stage}")):
            sys.exit(1)
    left = {"sampled": [sampled(*case) for case in CASES], "heard": heard()}
    (path / f"sampled-{ranks.mine()}.json").write_text(json.dumps(left))
