"""Logits as a trained model has them: a small one, trained here on text that is given.

A word-level language model learns for a minute or two; the batch is its hidden states, its head and the next words of
text that it has not seen. The same text gives the same batch.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

import rlhf_kernels as rk
from benchmarks.work.cases import Batch, packed
from benchmarks.work.truth import Truth

MOST_WORDS, HIDDEN, LENGTH, ROWS, STEPS = 8192, 256, 96, 16, 300
UNKNOWN, BREAK = 0, 1  # what starts the vocabulary
PIECES = re.compile(r"[A-Za-z]+|\d|[^\sA-Za-z\d]|\n")


def documents(path: Path) -> Iterator[str]:
    """All strings of each record of a jsonl or jsonl.gz file.

    Raises:
        ValueError: a line is no JSON, or there is no text.
    """
    found = 0
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"text: line {number} of {path} is no JSON: {error}") from None
            fields = record.values() if isinstance(record, dict) else [record]
            told = "\n".join(x for x in fields if isinstance(x, str))
            if told:
                found += 1
                yield told
    if not found:
        raise ValueError(f"text: {path} has no record with a string in it")


def encode(texts: list[list[str]], known: dict[str, int]) -> Tensor:
    ids = [i for pieces in texts for i in (BREAK, *(known.get(piece, UNKNOWN) for piece in pieces))]
    return torch.tensor(ids)


class Model(nn.Module):
    """Two recurrent layers between an embedding and a head of their own."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, HIDDEN)
        self.layers = nn.GRU(HIDDEN, HIDDEN, num_layers=2, batch_first=True)
        self.weight = nn.Parameter(torch.randn(words, HIDDEN) * HIDDEN**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.embed(ids))[0]


@cache
def trained(path: Path, steps: int) -> tuple[Model, Tensor]:
    """A model after so many steps, and held-out text as ids."""
    texts = [PIECES.findall(told.lower()) for told in documents(path)]
    held_out = max(len(texts) // 10, 1)
    learned = texts[:-held_out] or texts
    counts = Counter(piece for pieces in learned for piece in pieces)
    known = {piece: i + 2 for i, (piece, _) in enumerate(counts.most_common(MOST_WORDS - 2))}
    ids, unseen = encode(learned, known), encode(texts[-held_out:], known)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Model(-(-(len(known) + 2) // 64) * 64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(steps):
            starts = torch.randint(max(len(ids) - LENGTH, 1), (ROWS,))
            rows = ids[(starts[:, None] + torch.arange(LENGTH + 1)).clamp(max=len(ids) - 1)]
            hidden = model(rows[:, :-1])
            loss = rk.sft_loss(hidden, model.weight, rows[:, 1:].contiguous()).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model, unseen


def batch_of(
    path: Path, dtype: torch.dtype, *, tokens: int, device: str = "cpu", steps: int = STEPS
) -> tuple[Batch, Truth]:
    """Held-out documents as a batch, and the truth about it.

    Args:
        path: jsonl or jsonl.gz.
        dtype: of the head.
        tokens: rows of the batch; the text repeats where it is shorter.
        device: where the batch is to be.
        steps: of training.
    """
    model, ids = trained(path, steps)
    ids = ids.repeat(-(-(tokens + 1) // len(ids)))[: tokens + 1]
    with torch.no_grad():
        hidden = model(ids[None, :-1])[0]
    ends = (ids[1:-1] == BREAK).nonzero().squeeze(1) + 1
    if len(ends) < 8:  # long documents: cut them
        ends = torch.arange(1, 8) * (tokens // 8)
    ends = ends[(len(ends) + 1) % 2 :]  # an even number of sequences
    lengths = torch.cat([torch.zeros(1, dtype=torch.long), ends, torch.tensor([tokens])]).diff()
    rng = torch.Generator().manual_seed(0)
    head = hidden.to(device, dtype), model.weight.detach().to(device, dtype)
    return packed(*head, ids[1:].to(device), lengths, rng)
