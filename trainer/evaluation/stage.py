"""`rlhf-train eval`: what a policy won by its training, and what it lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from trainer.base.address import redacted
from trainer.base.statistics import Estimate, mean, proportion, ratio_change
from trainer.base.typed_options import check_types, settle
from trainer.data.chat import Format, render_of, settle_date
from trainer.data.encoding import encode_prompts
from trainer.data.prompt import asked
from trainer.evaluation.alignment_tax import Loss, Task, answer_all, held_out_texts, losses, per_token, read_task, right
from trainer.evaluation.judge import Judge, Responses, judge_from
from trainer.models.loading import load_policy
from trainer.models.policy import Policy
from trainer.models.rendering import render_as
from trainer.rewards.fields import read_prompts
from trainer.rewards.sources import responses_of
from trainer.run.log import RunLog
from trainer.run.mark import opened
from trainer.sampling.rollout import sample
from trainer.training.defaults import decided, told
from trainer.training.options import AUTO, Auto

SHOWN = 8
FORGOT = 0.05  # relative rise of the held-out loss that is called a tax


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """A policy on held-out prompts, text and tasks, beside the policy that it was trained from."""

    model: str
    """The policy: a run folder, a local directory or a hub id."""
    base: str | None = None
    """What it is compared with, usually the SFT model; without it there is nothing to win against."""
    data: Path | None = None
    """Held-out prompts for the win rate."""
    judge: str | None = None
    """Who compares: a reward model's folder, module:function of (prompts, responses, records) that scores, or
    compare:module:function of (prompts, first, second) that says 1, 0.5 or 0 for the first."""
    lm_data: Path | None = None
    """Held-out text or demonstrations: language-model loss before and after."""
    tasks: tuple[Path, ...] = ()
    """Files of prompt and answer: share of right answers, before and after."""
    out: Path = Path("runs/eval")
    """Folder for tables, samples and the report."""
    seed: int = 0
    """Of the sampling; both policies get the same."""
    prompts: int = 512
    """How many of the prompts are used, from the top of the file."""
    questions: int = 512
    """How many questions of each task."""
    max_new_tokens: Auto[int] = AUTO
    """Longest response; "auto" depends on the model."""
    temperature: float = 1.0
    """Of the responses that are compared; tasks are answered with the likeliest tokens."""
    max_length: int = 1024
    """Longest sequence; longer prompts are cut on the left."""
    max_tokens: int = 8192
    """Tokens per forward pass."""
    prompt_format: Format = "auto"
    """How to read a prompt that is plain text. auto: as one message of the user if the model has a chat template, else
    as it stands. chat: as a message of the user, and a model without a template is refused. raw: as it stands, for
    prompts that already hold a template's markup."""
    template_date: str | None = None
    """Date that the chat template puts into a prompt (YYYY-MM-DD), where it puts one; by default today."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto is the GPU if there is one."""
    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        settle(self)
        settle_date(self)
        check_types(self)


def evaluate(cfg: EvalConfig, log: RunLog | None = None) -> dict[str, Any]:
    """Evaluates; returns what it writes to ``summary.json``.

    Args:
        cfg: The configuration.
        log: Where to log; None makes a log in ``cfg.out``.

    Raises:
        ValueError: The configuration asks for nothing, or names what does not exist.
    """
    line, cfg = told(cfg), decided(cfg)
    check_eval(cfg)
    device = torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")
    if log is None:
        log = opened(cfg, "eval")
        if line:
            log.note(line)
    named = {"base": cfg.base, "policy": cfg.model} if cfg.base else {"policy": cfg.model}
    records: list[dict[str, Any]] = []
    if cfg.data is not None and cfg.judge is not None:
        judges = [("judge", cfg.judge)]
        render = render_as(cfg, cfg.base)
        records = read_prompts(cfg.data, judges, render=render, note=log.note, most=cfg.prompts)
    policies = {name: load_policy(path).to(device) for name, path in named.items()}
    results: dict[str, Any] = {}
    verdicts: list[dict[str, Any]] = []
    tasks = [read_task(path, render_as(cfg)) for path in cfg.tasks]
    if cfg.judge is not None:
        section, verdict = _responses(cfg, policies, records, device, log)
        results["responses"] = section
        verdicts += verdict
    if cfg.lm_data is not None:
        results["language_model"], verdict = _language_model(cfg, policies)
        verdicts += verdict
    for task in tasks:
        results[f"task {task.name}"] = _task(cfg, policies, task)
    for title, section in results.items():
        log.table(title.replace("_", " "), [("", *section), *_rows(section)])
    summary = {"verdicts": verdicts, **results}
    log.summary(_plain(summary))
    return summary


def check_eval(cfg: EvalConfig) -> None:
    """Refuses what has no meaning.

    Raises:
        ValueError: Names the option, what it got and what it wants.
    """
    if cfg.data is None and cfg.lm_data is None and not cfg.tasks:
        raise ValueError("data, lm_data, tasks: want at least one of them, there is nothing to evaluate on")
    if (cfg.data is None) != (cfg.judge is None):
        raise ValueError("judge: goes with data; give both for a win rate, or neither")
    if cfg.judge is not None and cfg.judge.startswith("compare:") and cfg.base is None:
        raise ValueError("base: a judge that compares needs a second policy")
    for name in ("prompts", "questions", "max_new_tokens", "max_length", "max_tokens"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name}: got {getattr(cfg, name)}, want at least 1")
    if not cfg.temperature >= 0:
        raise ValueError(f"temperature: got {cfg.temperature}, want zero or more")


def _responses(
    cfg: EvalConfig,
    policies: dict[str, Policy],
    records: list[dict[str, Any]],
    device: torch.device,
    log: RunLog,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Sampled responses before the judge, one column per policy."""
    assert cfg.judge is not None
    said = {name: respond(cfg, policy, records) for name, policy in policies.items()}
    judge = judge_from(cfg.judge, max_length=cfg.max_length, max_tokens=cfg.max_tokens, device=device)
    section: dict[str, dict[str, Any]] = {}
    for name, mine in said.items():
        section[name] = {
            "length": mean([float(n) for n in mine.lengths]),
            "truncated": proportion(sum(mine.rollout.truncated), len(records)),
        }
        if (scores := judge.scores(mine)) is not None:
            section[name]["score"] = mean(scores)
    _show(log, said, judge)
    if "base" not in said:
        return section, []
    won = judge.win_rate(said["policy"], said["base"])
    section["policy"]["win_rate"] = won
    ok = won.low > 0.5
    title = "The policy wins" if ok else "The policy loses" if won.high < 0.5 else "No winner"
    judged = f"{len(records)} held-out prompts, ties as halves, by {redacted(cfg.judge)}"
    text = f"Win rate {won} against {cfg.base} on {judged}."
    return section, [{"title": title, "text": text, "ok": ok}]


def respond(cfg: EvalConfig, policy: Policy, records: Sequence[dict[str, Any]]) -> Responses:
    """One response to each prompt."""
    prompts = [r["prompt"] for r in records]
    tokens = encode_prompts(policy.tokenizer, prompts, longest(cfg, policy) - cfg.max_new_tokens)
    source = torch.Generator(policy.weight.device).manual_seed(cfg.seed)
    rollout = sample(
        policy, tokens, max_new_tokens=cfg.max_new_tokens, generator=source, temperature=cfg.temperature, batch_size=64
    )
    return Responses(list(records), responses_of(rollout, policy.tokenizer), rollout, policy.tokenizer)


def longest(cfg: EvalConfig, policy: Policy) -> int:
    """Tokens of the longest sequence: of the options, or of the policy's positions.

    Raises:
        ValueError: That leaves nothing for a prompt.
    """
    found = policy.within(cfg.max_length)
    if cfg.max_new_tokens >= found:
        raise ValueError(f"max_new_tokens: got {cfg.max_new_tokens}, want less than the {found} tokens of a sequence")
    return found


def _language_model(
    cfg: EvalConfig, policies: dict[str, Policy]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Held-out loss; with two policies, the alignment tax."""
    assert cfg.lm_data is not None
    found: dict[str, list[Loss]] = {}
    read: dict[str, list[list[int]]] = {}
    most = min(policy.within(cfg.max_length) for policy in policies.values())
    for name, policy in policies.items():
        render = render_of(policy.tokenizer, cfg.prompt_format, cfg.template_date)
        samples = held_out_texts(cfg.lm_data, policy.tokenizer, most, render)
        if not samples:
            raise ValueError(f"lm_data: {cfg.lm_data} holds no text of two tokens or more")
        read[name] = [s.tokens[s.prompt_length :] for s in samples]
        found[name] = losses(policy, samples, cfg.max_tokens)
    section: dict[str, dict[str, Any]] = {
        name: {"nats_per_token": per_token(mine), "tokens": sum(x.tokens for x in mine)} for name, mine in found.items()
    }
    if "base" not in found or read["base"] != read["policy"]:
        return section, []  # losses of different tokens have nothing to say to each other
    tax = ratio_change([x.nats for x in found["base"]], [x.nats for x in found["policy"]])
    section["policy"]["tax"] = tax
    ok = tax.value <= FORGOT
    title = "It still knows its language" if ok else "Alignment tax"
    text = f"Held-out language-model loss changed by {tax.value:+.1%} [{tax.low:+.1%}, {tax.high:+.1%}]."
    return section, [{"title": title, "text": text, "ok": ok}]


def _task(cfg: EvalConfig, policies: dict[str, Policy], task: Task) -> dict[str, dict[str, Any]]:
    """Share of right answers; with two policies, the difference on the same questions."""
    prompts, answers = task.prompts[: cfg.questions], task.answers[: cfg.questions]
    got: dict[str, list[float]] = {}
    for name, policy in policies.items():
        said = answer_all(policy, prompts, max_new_tokens=cfg.max_new_tokens, max_length=longest(cfg, policy))
        got[name] = [float(right(a, text)) for a, text in zip(answers, said, strict=True)]
    section: dict[str, dict[str, Any]] = {
        name: {"right": proportion(sum(hits), len(hits)), "questions": len(hits)} for name, hits in got.items()
    }
    if "base" in got:
        change = [b - a for a, b in zip(got["base"], got["policy"], strict=True)]
        section["policy"]["change"] = mean(change)
    return section


def _show(log: RunLog, said: dict[str, Responses], judge: Judge) -> None:
    """Responses side by side, with their scores where the judge gives any."""
    scores = {name: judge.scores(mine) for name, mine in said.items()}
    first = next(iter(said.values()))
    shown: list[dict[str, Any]] = []
    for i in range(min(SHOWN, len(first.records))):
        row: dict[str, Any] = {"prompt": asked(first.records[i]["prompt"])}
        for name, mine in said.items():
            row[name] = mine.texts[i]
            if (own := scores[name]) is not None:
                row[f"{name}_score"] = own[i]
        shown.append(row)
    log.samples("Responses", shown)


def _rows(section: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    names = list(dict.fromkeys(name for column in section.values() for name in column))
    return [(n.replace("_", " "), *(_cell(column.get(n)) for column in section.values())) for n in names]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value.to_dict()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value
