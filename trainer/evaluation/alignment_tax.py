"""What a policy still knows: its loss on held-out text, and answers to tasks of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trainer.data import reading as data
from trainer.data.chat import render_of
from trainer.data.encoding import encode_pairs, encode_prompts, encode_texts
from trainer.data.lines import rows
from trainer.data.packing import Sample, pack, within_budget
from trainer.data.prompt import Render
from trainer.data.tokenizer import prefix
from trainer.models.policy import Policy
from trainer.rewards.exact_answer import is_number, last_number
from trainer.rewards.sources import responses_of
from trainer.sampling.rollout import sample


class Loss(NamedTuple):
    """Of one text."""

    nats: float
    tokens: int


def held_out_texts(path: Path, tokenizer: Any, max_length: int, render: Render | None = None) -> list[Sample]:
    """Texts for ``losses``: lines with a ``text`` count whole, demonstrations count their response.

    Args:
        path: jsonl, jsonl.gz or parquet; its first object decides which of the two it is.
        tokenizer: Of the policy.
        max_length: Tokens per text; longer ones lose their end.
        render: Of demonstrations; by default the tokenizer's own.

    Raises:
        ValueError: It holds neither, or too many bad lines.
    """
    first = next((row for _, row in rows(path) if isinstance(row, dict)), {})
    if isinstance(first.get("text"), str):
        texts = [record["text"] for record in data.read(path, "texts")]
        # The first token is a prompt of one, unless something stands before it.
        cut, before = [ids[:max_length] for ids in encode_texts(tokenizer, texts)], len(prefix(tokenizer)) or 1
        return [Sample(ids, before) for ids in cut if len(ids) > before]
    records = data.read(path, "demonstrations", render=render or render_of(tokenizer))
    return encode_pairs(tokenizer, [r["prompt"] for r in records], [r["response"] for r in records], max_length)


@torch.no_grad()
def losses(policy: Policy, samples: Sequence[Sample], max_tokens: int) -> list[Loss]:
    """Negative log-probability of the tokens behind each prompt.

    Args:
        policy: Any causal language model.
        samples: At least one.
        max_tokens: Per forward pass.
    """
    found: list[Loss] = []
    for part in within_budget([len(s.tokens) for s in samples], max_tokens):
        packed = pack([samples[i] for i in part], policy.weight.device)
        logp, mask = policy.stats(packed).logp.double(), packed.mask
        for rows_of, kept in zip(logp.split(packed.lengths), mask.split(packed.lengths), strict=True):
            found.append(Loss(-float(rows_of.sum()), int(kept.sum())))
    return found


def per_token(found: Sequence[Loss]) -> float:
    """Mean over tokens, in nats."""
    return sum(x.nats for x in found) / max(sum(x.tokens for x in found), 1)


class Task(NamedTuple):
    """Questions with one right answer each."""

    name: str
    prompts: list[str]
    answers: list[str]


def read_task(path: Path, render: Render) -> Task:
    """A file of prompts (or questions) with the field ``answer``.

    Args:
        path: jsonl, jsonl.gz or parquet.
        render: Of the policy that answers.

    Raises:
        ValueError: A line has no answer, or more than 1 % of the lines are bad.
    """
    lines: list[int] = []
    records = data.read(path, "prompts", render=render, lines=lines)
    for line, record in zip(lines, records, strict=True):
        if not isinstance(record["extra"].get("answer"), str | int | float | Decimal):
            raise ValueError(f"tasks: {path} line {line} has no answer")
    return Task(Path(path).name.split(".")[0], [r["prompt"] for r in records], [_said(r["extra"]) for r in records])


def right(answer: str, response: str) -> bool:
    """Whether a response gives the answer: its last number if the answer is one (or ends in ``#### number``).

    What a number is, ``trainer.rewards.exact_answer`` says. Where the answer is none, the whole of both is compared,
    without case, outer blanks and a final full stop.

    >>> right("2 + 2 = 4 #### 4", "So it is 4."), right("Paris", " paris."), right("Paris", "Paris or Rome")
    (True, True, False)
    """
    final = answer.rsplit("####", 1)[-1].strip()
    if is_number(final):
        return last_number(response) == last_number(final)
    return _bare(final) == _bare(response)


def answer_all(
    policy: Policy, prompts: Sequence[str], *, max_new_tokens: int, max_length: int = 1024, batch_size: int = 64
) -> list[str]:
    """The likeliest continuation of each prompt, token by token.

    Args:
        policy: Any causal language model.
        prompts: Texts.
        max_new_tokens: Longest answer.
        max_length: Of prompt and answer together; longer prompts lose their beginning.
        batch_size: Prompts in flight together.
    """
    tokens = encode_prompts(policy.tokenizer, prompts, max_length - max_new_tokens)
    nothing_random = torch.Generator(policy.weight.device)
    rollout = sample(
        policy, tokens,
        max_new_tokens=max_new_tokens, generator=nothing_random, temperature=0.0, batch_size=batch_size,
    )  # fmt: skip
    return responses_of(rollout, policy.tokenizer)


def _said(extra: dict[str, Any]) -> str:
    return str(extra["answer"])


def _bare(text: str) -> str:
    return text.strip().rstrip(".").casefold()
