"""Prompts as people write them: texts, transcripts and conversations."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.families import tokenizer
from tests.support.small import write
from trainer.data import reading as data
from trainer.data.chat import render_of
from trainer.data.encoding import encode_pairs, encode_prompts
from trainer.data.prompt import asked, conversation, render_turns
from trainer.models.rendering import render_for
from trainer.models.tiny import tiny_policy

USER = [{"role": "user", "content": "What is 2 + 2?"}]

TURNS = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What is 2 + 2?\n\nAssistant:"


def test_a_prompt_is_a_text_that_knows_its_conversation():
    prompt = render_of(tokenizer("smollm2"))(USER)
    for twin in (copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert (twin, twin.messages, twin.plain) == (prompt, tuple(USER), "\n\nHuman: What is 2 + 2?\n\nAssistant:")
    assert json.dumps(prompt) == json.dumps(str(prompt))


@pytest.mark.parametrize("form", ["auto", "chat", "raw"])
def test_prompts_that_are_texts(tmp_path: Path, form: Any):
    """A question is a user's message, a transcript its turns, and with raw both are what they are."""
    tok = tokenizer("smollm2")
    path = write(tmp_path / "d.jsonl", [{"question": USER[0]["content"]}, {"prompt": TURNS}])
    question, transcript = (r["prompt"] for r in data.read(path, "prompts", render=render_of(tok, form)))
    if form == "raw":
        assert (question, transcript) == (USER[0]["content"], TURNS)
        assert encode_prompts(tokenizer("llama3"), [question], 99) == [tokenizer("llama3")(question)["input_ids"]]
        return
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, *USER]
    for prompt, messages in ((question, USER), (transcript, turns)):
        assert prompt == tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert list(prompt.messages) == messages
    assert (asked(question), asked(transcript)) == (USER[0]["content"], TURNS)
    (blank,), (bare,) = encode_pairs(tok, [transcript], [" 4"], 900), encode_pairs(tok, [transcript], ["4"], 900)
    assert blank.tokens == bare.tokens


def test_a_template_is_wanted_and_there_is_none(tmp_path: Path, plain: Any):
    tiny_policy(plain, 0, hidden=32, layers=1).save(tmp_path)
    for model in (str(tmp_path), "tiny"):
        with pytest.raises(ValueError, match="prompt_format: got chat, and the model's tokenizer has no chat template"):
            render_for(model, "chat")
        assert render_for(model) is render_turns


def test_markup_in_a_text_asks_for_raw():
    tok = tokenizer("smollm2")
    done = tok.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    with pytest.raises(ValueError, match="prompts that are rendered already want prompt_format=raw"):
        render_of(tok).text(done)
    raw, own = render_of(tok, "raw").text(done), render_of(tok)(USER)
    assert encode_pairs(tok, [raw], ["It is 4."], 900) == encode_pairs(tok, [own], ["It is 4."], 900)


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ("\n\nHuman: Hi\n\nAssistant: ", ["user"]), ("Human: Hi\n\nAssistant:", ["user"]),
        ("Be brief.\n\nHuman: Hi\n\nAssistant:", ["system", "user"]),
        ("\n\nHuman: Hi\n\nHuman: So?\n\nAssistant: Yes\n\nHuman: Well\n\nAssistant:", ["user", "assistant", "user"]),
        ("Human: Hi", ["user"]), ("Write a play.\n\nAssistant:", ["user"]),
    ],
)  # fmt: skip
def test_transcripts_with_small_flaws(text: str, roles: list[str]):
    assert [m["role"] for m in conversation(text)] == roles
