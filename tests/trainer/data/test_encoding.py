"""What a model reads: ids that exist, ends of every kind, cuts, days, and prompts as people write them.

Families of tokenizers are in ``test_families.py``; here is what they have in common.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families import tokenizer
from tests.support.small import write
from trainer.data import reading as data
from trainer.data.chat import ChatTemplate, render_of
from trainer.data.encoding import encode_pairs, encode_prompts
from trainer.data.prompt import render_turns
from trainer.data.tokenizer import encode

USER = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.mark.parametrize("name", ["smollm2", "gemma2", "mistral1", "glm4"])
def test_an_end_that_is_there_already_is_written_once(name: str):
    tok = tokenizer(name)
    render = render_of(tok)
    assert isinstance(render, ChatTemplate)
    prompt = render(USER)
    (once,) = encode_pairs(tok, [prompt], ["It is 4."], 900)
    for end in {render.end, tok.eos_token}:
        assert encode_pairs(tok, [prompt], [f"It is 4.{end}"], 900)[0].tokens == once.tokens
        assert encode_pairs(tok, [prompt], [f"It is 4.{end}\n"], 900)[0].tokens == once.tokens


def test_a_reply_stops_at_an_end_within_it(plain: Any):
    told: list[str] = []
    once, within = encode_pairs(plain, ["p", "p"], ["It is", "It is<eos> not"], 99, note=told.append)
    assert within.tokens == once.tokens
    assert told == ["1 of 2 responses hold the end of a response within their text; they stop there."]


def test_one_row_reads_alike_in_every_kind_of_record(tmp_path: Path):
    """UltraFeedback's form, whose prompt stands in it twice, and GSM8K's."""
    said = [{"role": "assistant", "content": text} for text in ("4", "5")]
    rows = [
        {"prompt": USER[0]["content"], "chosen": [*USER, said[0]], "rejected": [*USER, said[1]]},
        {"question": USER[0]["content"], "answer": "4", "label": True},
        {"messages": [*USER, said[0]], "prompt": USER[0]["content"], "label": True},
    ]
    kinds: list[list[data.Kind]] = [
        ["demonstrations", "ranked", "labelled", "prompts"], ["demonstrations", "labelled", "prompts"],
        ["demonstrations", "labelled", "prompts"],
    ]  # fmt: skip
    for tok in (tokenizer("smollm2"), tokenizer("pythia")):
        render = render_of(tok)
        for row, those in zip(rows, kinds, strict=True):
            path = write(tmp_path / "d.jsonl", [row])
            prompts = {str(data.read(path, kind, render=render)[0]["prompt"]) for kind in those}
            assert len(prompts) == 1, (row, prompts)


def test_the_blank_between_turns_belongs_to_whoever_reads():
    """A reply sampled in plain turns begins with a blank; a template wants none, and the other way round."""
    plainly, chatty = render_turns(USER), render_of(tokenizer("smollm2"))(USER)
    for prompt, said in ((plainly, " It is 4."), (chatty, "It is 4.")):
        for name, want in (("smollm2", "It is 4."), ("pythia", " It is 4.")):
            tok = tokenizer(name)
            (one,) = encode_pairs(tok, [prompt], [said], 900)
            assert tok.decode(one.tokens[one.prompt_length : -1]) == want
            assert one.tokens[: one.prompt_length] == encode_prompts(tok, [prompt], 900)[0]


def test_a_text_that_stands_behind_another_has_no_blank_of_its_own():
    assert encode(tokenizer("llama_base"), ["a"]) != encode(tokenizer("llama_base"), ["</s>a"])
    (one,) = encode_pairs(tokenizer("llama_base"), ["2 + 2 ="], ["4"], 99)
    assert tokenizer("llama_base").decode(one.tokens, skip_special_tokens=True) == "2 + 2 =4"


@pytest.mark.parametrize(
    ("prompt", "reply", "room", "kept", "reply_kept"),
    [
        (60, 5, 100, 60, 6), (60, 5, 66, 60, 6),  # it fits
        (60, 5, 65, 59, 6), (95, 9, 100, 90, 10),  # the prompt gives way
        (80, 80, 100, 50, 50), (10, 200, 100, 10, 90), (60, 200, 100, 50, 50),  # to its half, then the reply
    ],
)  # fmt: skip
def test_what_fits_is_not_cut(plain: Any, prompt: int, reply: int, room: int, kept: int, reply_kept: int):
    told: list[str] = []
    (found,) = encode_pairs(plain, ["x" * prompt], ["y" * reply], room, note=told.append)
    assert (found.prompt_length, len(found.tokens) - found.prompt_length) == (kept, reply_kept)
    assert any("prompts have more" in line for line in told) == (kept < prompt)
    assert any("do not fit" in line for line in told) == (reply_kept <= reply)
    assert (found.tokens[-1] == plain.eos_token_id) == (reply_kept > reply)


def test_replies_to_one_prompt_see_the_same_of_it(plain: Any):
    short, long = encode_pairs(plain, ["x" * 60 + "abc"] * 2, ["y", "y" * 50], 80, groups=[2])
    assert short.prompt_length == long.prompt_length == 40
    assert short.tokens[:40] == long.tokens[:40]


def test_a_cut_prompt_keeps_what_stands_before_a_text():
    tok = tokenizer("glm4")
    (ids,) = encode_prompts(tok, ["x y z " * 30], 10)
    assert tok.convert_ids_to_tokens(ids[:2]) == ["[gMASK]", "<sop>"]
    assert len(ids) == 10


@pytest.mark.parametrize("name", ["llama_base", "mistral1", "xglm", "pythia"])
@pytest.mark.parametrize(("prompt", "reply"), [("The answer is: ", "4"), ("The answe", "r is 4"), ("2 +", " 2")])
def test_nothing_is_put_between_prompt_and_reply(name: str, prompt: str, reply: str):
    tok = tokenizer(name)
    (one,) = encode_pairs(tok, [prompt], [reply], 99)
    whole = tok.decode(tok(prompt + reply)["input_ids"], skip_special_tokens=True)
    assert tok.decode(one.tokens, skip_special_tokens=True).strip() == whole.strip()
    assert one.tokens[: one.prompt_length] == encode_prompts(tok, [prompt], 99)[0]


@pytest.mark.parametrize("room", [1, 2, 3])
def test_no_room_is_kept_too(room: int):
    for name in ("glm4", "llama_base", "pythia"):
        (prompt,) = encode_prompts(tokenizer(name), ["What is it?"], room)
        assert len(prompt) == room
        (one,) = encode_pairs(tokenizer(name), ["What is it?"], ["It is 4."], room)
        assert one.prompt_length <= len(one.tokens) <= room
