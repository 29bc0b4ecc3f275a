"""Templates that are odd in the ways of published ones, and what each is to give."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import FAMILIES, templates, tokenizer
from tests.support.small import write
from trainer.data import reading as data
from trainer.data.chat import render_of
from trainer.data.encoding import encode_pairs, encode_prompts
from trainer.models.loading import load_scalar
from trainer.models.tiny import byte_tokenizer, tiny_policy
from trainer.stages.sft import SFTConfig

USER = {"role": "user", "content": "What is 2 + 2?"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(path: Path, name: str, kind: Any = "demonstrations") -> tuple[list[data.Record], list[str]]:
    told: list[str] = []
    return data.read(path, kind, render=render_of(tokenizer(name)), note=told.append), told


@pytest.mark.parametrize("reply", ["<think>\nI add.\n</think>\n\nFour.", "\n<think>\nI add.\n</think>\n\nFour."])
@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1"])
def test_a_prompt_that_opens_the_reasoning_opens_it_once(name: str, reply: str):
    """As of models that always reason; one template keeps a finished reasoning, and the other drops it."""
    tok = FAMILIES[name].make()
    if name == "qwen3":
        turn = "{{- '<|im_start|>assistant\\n' }}"
        assert turn in templates.QWEN3
        tok.chat_template = templates.QWEN3.replace(turn, turn.replace("\\n'", "\\n<think>\\n'"))
    prompt = render_of(tok)([USER])
    assert prompt.endswith("<think>\n")
    (one,) = encode_pairs(tok, [prompt], [reply], 900)
    text = tok.decode(one.tokens[one.prompt_length : -1])
    assert text == "I add.\n</think>\n\nFour."


def test_a_reply_that_a_template_rewrites_is_as_it_writes_it():
    tok = tokenizer("qwen3")
    (one,) = encode_pairs(tok, [render_of(tok)([USER])], ["<think>I add.</think>Four."], 900)
    whole = tok.apply_chat_template([USER, said("<think>I add.</think>Four.")], return_dict=False)
    assert one.tokens == whole[: len(one.tokens)]


@pytest.mark.parametrize("name", ["smollm2", "qwen2", "mistral1", "olmo2", "gemma2", "glm4"])
@pytest.mark.parametrize("reply", [" 4", "end", "im_end", ">", "s", "user", "What is 2 + 2?", "assistant", "\n 4 \n"])
def test_no_reply_is_taken_for_the_markup_around_it(name: str, reply: str):
    told: list[str] = []
    tok = tokenizer(name)
    (one,) = encode_pairs(tok, [render_of(tok)([USER])], [reply], 900, note=told.append)
    assert not told
    assert reply.strip() in tok.decode(one.tokens[one.prompt_length : -1])


@pytest.mark.parametrize("name", ["mistral1", "gemma2"])
def test_what_a_template_refuses_is_a_bad_line(tmp_path: Path, name: str):
    good: list[dict[str, Any]] = [{"messages": [USER, said("4")]}] * 300
    twice = {"messages": [USER, said("Let me see."), said("4")]}
    transcript = {"prompt": "\n\nHuman: Hi\n\nAssistant: a\n\nAssistant:", "response": " yes"}
    records, told = read(write(tmp_path / "d.jsonl", [*good, twice, transcript]), name)
    assert len(records) == 300
    assert "line 301: the chat template refuses this conversation" in told[0]
    assert "line 302: the chat template refuses" in told[0]


def test_markers_of_every_kind_are_bad_lines_in_prompts_and_replies(tmp_path: Path):
    tok = FAMILIES["llama3"].make()
    header = "<|start_header_id|>"
    assert header in render_of(tok).markers  # type: ignore[union-attr]
    rows: list[dict[str, Any]] = [{"messages": [USER, said("4")]}] * 300
    rows += [
        {"messages": [USER | {"content": f"Hi{header}system"}, said("4")]},
        {"messages": [USER, said(f"4{header}x")]},
    ]
    told: list[str] = []
    path = write(tmp_path / "d.jsonl", rows)
    assert len(data.read(path, "demonstrations", render=render_of(tok), note=told.append)) == 300
    assert f"line 301: a message holds the special token '{header}'" in told[0]
    assert f"line 302: a message holds the special token '{header}'" in told[0]


def test_a_reply_that_is_nothing_but_its_end_is_empty(tmp_path: Path):
    rows = [{"messages": [USER, said("4")]}, {"messages": [USER, said("<|im_end|>")]}]
    records, told = read(write(tmp_path / "d.jsonl", rows), "smollm2")
    assert len(records) == 1
    assert "1 with an empty reply" in told[0]


def test_nulls_in_messages_are_absent(tmp_path: Path):
    tok = tokenizer("smollm2")
    strict = "{% for m in messages %}{% if 'tool_calls' in m %}{{ m.tool_calls | length }}{% endif %}{% endfor %}"
    tok = FAMILIES["smollm2"].make()
    tok.chat_template = strict + tok.chat_template
    row = {"messages": [USER | {"name": None}, said("4") | {"tool_calls": None}]}
    (record,) = data.read(write(tmp_path / "d.jsonl", [row]), "demonstrations", render=render_of(tok))
    assert record["prompt"].messages == (USER,)


def test_a_template_that_misleads_is_left_out_where_prompts_are_raw(tmp_path: Path):
    tok = byte_tokenizer(["What is it?"], 280)
    tok.chat_template = templates.SMOLLM2
    tiny_policy(tok, 0, hidden=32, layers=1).save(tmp_path)
    with pytest.raises(ValueError, match="or leave the template out with prompt_format=raw"):
        render_of(tok)
    prompt = render_of(tok, "raw").text("What is it?")
    (one,) = encode_pairs(tok, [prompt], ["This."], 99)
    assert one.tokens[-1] == tok.eos_token_id
    load_scalar(str(tmp_path), torch.Generator().manual_seed(0))


def test_a_day_may_come_with_a_time():
    assert SFTConfig(data="d", template_date=datetime(2026, 11, 28, 12)).template_date == "2026-11-28"  # type: ignore[arg-type]


def test_plain_prompts_keep_the_day_for_whoever_writes_it():
    prompt = render_of(tokenizer("pythia"), date="2001-02-03")([USER])
    tok = tokenizer("llama3")
    assert "03 Feb 2001" in tok.decode(encode_prompts(tok, [prompt], 900)[0])


@pytest.mark.parametrize("date", [None, "2001-02-03"])
def test_a_reply_is_rendered_on_the_day_of_its_prompt(date: str | None):
    """As in a run that goes on after midnight."""
    tok = tokenizer("llama3")
    prompt = render_of(tok, date=date)([USER])
    (one,) = encode_pairs(tok, [prompt], [" It is 4.\n"], 900)
    assert tok.decode(one.tokens[one.prompt_length : -1]) == "It is 4."  # The template trims.
