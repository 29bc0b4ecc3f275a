"""How little of a real gradient matters: a small language model is trained on real text, and its logits are looked at.

    python -m benchmarks real-logits --text FILE.jsonl.gz --out results.json      # about ten minutes on a CPU
    python -m benchmarks real-logits --draw results.json docs                     # docs/tolerance-*.svg

At several steps of training, on held-out text and on what the model samples itself (as in RL), it measures per token:
1 - p(target); how many probabilities exceed a threshold; how many entries of the logits' gradient carry all but a
share of its norm; how many tiles of 64 tokens x 128 columns hold an entry at all, the vocabulary as it is and ordered
by frequency; and what the sparse backward saves and costs. Text is a jsonl of strings, or of question and answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import rlhf_kernels as rk
from benchmarks import command
from benchmarks.report.environment import environment, write
from benchmarks.studies.tolerance import errors
from benchmarks.work.text import documents
from trainer.models.tiny import byte_tokenizer
from trainer.report.plots import Line, drawing

STEPS, LOOK = 600, (0, 50, 150, 300, 600)
LENGTH, BATCH, ROWS = 256, 12, 1024
VOCABULARY, HIDDEN, LAYERS = 8192, 256, 3
TOLERANCES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3)
TOLERANCE = 2e-4  # whose tiles are counted
THRESHOLDS = tuple(10.0**-k for k in range(1, 8))
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
TILE = (64, 128)


def entries(p: Tensor, targets: Tensor) -> tuple[dict[str, list[float]], Tensor]:
    """For each tolerance: quantiles over tokens of how many entries of onehot - p it leaves; and those of TOLERANCE."""
    g = -p
    rows = torch.arange(len(p))
    g[rows, targets] += 1
    energy, order = g.square().sort(1, descending=True)
    rest = F.pad(energy.flip(1).cumsum(1).flip(1), (0, 1))  # of all but the first none, one, two ...
    found, kept = {}, torch.zeros(0)
    for tolerance in TOLERANCES:
        count = (rest > tolerance**2 * g[rows, targets].square().mean()).sum(1)
        found[f"{tolerance:g}"] = torch.quantile(count.double(), torch.tensor(QUANTILES).double()).tolist()
        if tolerance == TOLERANCE:
            first = torch.arange(p.shape[1]) < count[:, None]
            kept = torch.zeros_like(first).scatter_(1, order, first)
    return found, kept


def tiles(kept: Tensor, order: Tensor) -> float:
    """Share of tiles with an entry."""
    n, v = (len(kept) // TILE[0] * TILE[0], kept.shape[1] // TILE[1] * TILE[1])
    blocks = kept[:, order][:n, :v].view(n // TILE[0], TILE[0], v // TILE[1], TILE[1])
    return blocks.any(3).any(1).double().mean().item()


def gradient(
    hidden: Tensor, weight: Tensor, targets: Tensor, tolerance: float | None
) -> tuple[float, Any, rk.LossOutput]:
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    began = time.process_time()
    out = rk.ppo_loss(x, w, targets, None, torch.linspace(-1, 1, len(targets)), tolerance=tolerance)
    grads = torch.autograd.grad(out.loss, (x, w))
    return time.process_time() - began, grads, out


def in_bf16(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of plain torch whose weights, hidden states and logits are bfloat16."""
    x, w = (t.bfloat16().requires_grad_() for t in (hidden, weight))
    logp = F.linear(x, w).float().log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    loss = -(torch.linspace(-1, 1, len(targets)) * logp).mean()
    grads = torch.autograd.grad(loss, (x, w))
    return grads[0], grads[1]


def look(hidden: Tensor, weight: Tensor, targets: Tensor, frequent: Tensor) -> dict[str, Any]:
    """What the study says about these tokens."""
    logits = hidden.double() @ weight.double().T
    p = logits.softmax(1)
    of_target = p.gather(1, targets[:, None]).squeeze(1)
    stats = rk.token_stats(hidden, weight, targets)
    counts, kept = entries(p.clone(), targets)
    natural = torch.arange(weight.shape[0])
    saved: dict[str, Any] = {}
    exact = min((gradient(hidden, weight, targets, None) for _ in range(5)), key=lambda x: x[0])
    for tolerance in TOLERANCES:
        seconds, grads, out = min((gradient(hidden, weight, targets, tolerance) for _ in range(5)), key=lambda x: x[0])
        dense = float(out.metrics["tolerance/dense"])
        saved[f"{tolerance:g}"] = {"cpu": seconds / exact[0], "dense": dense} | errors(grads, exact[1])
    return {
        "entropy": float(stats.entropy.mean()), "nll": float(-stats.logp.mean()),
        "1-p": torch.quantile(1 - of_target, torch.tensor(QUANTILES).double()).tolist(),
        "sure": {f"{x:g}": float((1 - of_target < x).double().mean()) for x in (0.1, 0.01, 0.001)},
        "above": {f"{x:g}": float((p > x).sum(1).double().mean()) for x in THRESHOLDS},
        "entries": counts, "tiles": tiles(kept, natural), "tiles, by frequency": tiles(kept, frequent),
        "saved": saved, "plain torch in bf16": errors(in_bf16(hidden, weight, targets), exact[1]),
    }  # fmt: skip


@torch.no_grad()
def sampled(model: LlamaForCausalLM, prompts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Hidden states and tokens of the model's own continuations at temperature one."""
    cache, found, states, step = None, [], [], prompts
    for _ in range(length):
        out = model.model(step, past_key_values=cache, use_cache=True)
        cache, last = out.past_key_values, out.last_hidden_state[:, -1]
        step = torch.multinomial(model.lm_head(last).softmax(1), 1)
        states.append(last)
        found.append(step)
    return torch.stack(states, 1).flatten(0, 1), torch.cat(found, 1).flatten()


def study(texts: Sequence[str], seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(texts, VOCABULARY)
    ids = torch.tensor([t for text in texts for t in [*tokenizer(text).input_ids, tokenizer.eos_token_id]])
    windows = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    windows = windows[torch.randperm(len(windows))]
    held, windows = windows[:64], windows[64:]
    frequent = torch.bincount(ids, minlength=VOCABULARY).argsort(descending=True)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False, max_position_embeddings=LENGTH,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    stages = {}
    for step in range(STEPS + 1):
        if step in LOOK:
            with torch.no_grad():
                states = model.model(held[: ROWS // LENGTH * 2, :-1]).last_hidden_state.flatten(0, 1)
            picked = torch.randperm(len(states))[:ROWS]
            weight = model.lm_head.weight.detach()
            target = held[: ROWS // LENGTH * 2, 1:].flatten()
            stages[step] = {"held-out text": look(states[picked], weight, target[picked], frequent)}
            hidden, tokens = sampled(model, held[:16, :32], ROWS // 16)
            stages[step]["its own samples"] = look(hidden, weight, tokens, frequent)
            at = f"{TOLERANCE:g}"
            brief = {name: (round(x["nll"], 2), x["entries"][at][2]) for name, x in stages[step].items()}
            print(f"step {step}: (nll, median entries at {at}) {brief}", flush=True)
        batch = windows[torch.randint(len(windows), (BATCH,))]
        states = model.model(batch[:, :-1]).last_hidden_state
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 50)
        rk.sft_loss(states, model.lm_head.weight, batch[:, 1:]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"vocabulary": VOCABULARY, "hidden": HIDDEN, "tokens": len(ids), "stages": stages}


def draw(result: dict[str, Any], folder: Path) -> None:
    """Two figures: entries that matter against the step of training, and what the backward costs."""
    steps = [float(s) for s in result["stages"]]
    for name in ("held-out text", "its own samples"):
        stages = [stage[name] for stage in result["stages"].values()]
        lines = [
            Line(f"{t:g}", i, steps, [s["entries"][f"{t:g}"][2] for s in stages]) for i, t in enumerate(TOLERANCES[:5])
        ]
        slug = name.replace(" ", "-")
        title = f"entries that matter of {result['vocabulary']}, {name} (median token, by tolerance)"
        (folder / f"tolerance-entries-{slug}.svg").write_text(drawing(title, lines))


def main(argv: list[str] | None = None) -> None:
    parser = command.parser("real-logits", __doc__)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draw", nargs=2, type=Path, metavar=("RESULTS", "FOLDER"))
    args = parser.parse_args(argv)
    if args.draw:
        return draw(json.loads(args.draw[0].read_text()), args.draw[1])
    if args.text is None:
        parser.error("--text FILE or --draw RESULTS FOLDER is needed")
    here = environment(torch.get_num_threads())
    return write(args.out, {"environment": here, **study(list(documents(args.text)), args.seed)})
