"""Tokenizers and chat templates of public families: the library reads and writes what each family's models are used to.

What is right comes from the tokenizer alone: ``apply_chat_template`` and ``tok(text)``, which is what inference does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.families import CHATS, FAMILIES, PLAIN, policy, tokenizer
from tests.families.written import BRIEF, SAID, WRITTEN
from trainer.data import reading as data
from trainer.data.chat import render_of
from trainer.data.encoding import encode_pairs, encode_prompts
from trainer.data.packing import Packed, Sample
from trainer.data.prompt import render_turns
from trainer.data.tokenizer import decode
from trainer.evaluation.alignment_tax import held_out_texts
from trainer.models.policy import ScalarModel, scalar_from
from trainer.rewards.sources import reward_from
from trainer.sampling.rollout import Rollout

ROOM = 900
Q = "What is 2 + 2?"
USER, SYSTEM = {"role": "user", "content": Q}, {"role": "system", "content": "Be brief."}
MORE = [{"role": "assistant", "content": "It is 4."}, {"role": "user", "content": " Why?\nSag es auf Größe 你好 🙂 "}]
TALKS = {"one": [USER], "system": [SYSTEM, USER], "more": [USER, *MORE]}
REPLIES = {
    "plain": "The answer is 4.",
    "blank": " Yes, it is.",
    "lines": "\n\nNo.\nYes.\n",
    "far": "Größe 你好, été 🙂",
}
KINDS: tuple[data.Kind, ...] = ("demonstrations", "ranked", "labelled", "prompts")


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def ids_of(name: str, messages: Sequence[Any], *, prompt: bool = False) -> list[int]:
    return tokenizer(name).apply_chat_template(
        list(messages), add_generation_prompt=prompt, tokenize=True, return_dict=False
    )


def read_ids(name: str, text: str) -> list[int]:
    """A text as its own tokenizer reads it, less an end that it writes itself."""
    ids = tokenizer(name)(text)["input_ids"]
    return ids[:-1] if name == "llama_base" else ids


def ends_of(name: str) -> list[int]:
    return tokenizer(name).convert_tokens_to_ids(list(FAMILIES[name].ends))


def check(name: str, sample: Sample, prompt: list[int], whole: list[int], reply: str) -> None:
    """Prompt and reply are those of the whole text as far as the reply's end, if that begins with the prompt."""
    ends, tok = ends_of(name), tokenizer(name)
    if whole[: len(prompt)] != prompt:
        whole = prompt + tok(reply, add_special_tokens=False)["input_ids"]
    last = next((i for i in range(len(prompt), len(whole)) if whole[i] in ends), len(whole))
    assert sample.tokens[: sample.prompt_length] == prompt
    told = [tok.convert_ids_to_tokens(ids) for ids in (sample.tokens[len(prompt) : -1], whole[len(prompt) : last])]
    assert told[0] == told[1]
    assert sample.tokens[-1] in (ends[:1] if FAMILIES[name].writes_end else ends[:2])


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", CHATS)
def test_a_template_here_writes_what_the_family_publishes(name: str) -> None:
    today = f"{datetime.now():%d %b %Y}"
    first, reply, ask, again, end = (x.replace("DATE", today) for x in WRITTEN[name])
    talk, tok = [USER | {"content": "Hi"}, said("Yes."), USER | {"content": "Why?"}], tokenizer(name)
    prompt = tok.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert prompt == f"{first}Hi{reply}Yes.{ask}Why?{again}"
    reasons = FAMILIES[name].lead if name == "qwen3" else ""
    assert tok.apply_chat_template(talk[:2], tokenize=False) == f"{first}Hi{reply}{reasons}Yes.{end}"
    if name in BRIEF:
        prompt = tok.apply_chat_template([SYSTEM, talk[0]], tokenize=False, add_generation_prompt=True)
        assert prompt == BRIEF[name].replace("DATE", today) + f"Hi{again}"
    if name in SAID:
        whole, prompt = ids_of(name, [talk[0], said("Hello there")]), ids_of(name, talk[:1], prompt=True)
        assert "".join(tok.convert_ids_to_tokens(whole[len(prompt) :])).startswith(SAID[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tokenizer_here_has_the_rules_of_its_family(name: str, tmp_path: Path) -> None:
    tok, family = tokenizer(name), FAMILIES[name]
    assert tok.convert_ids_to_tokens(read_ids(name, "")) == list(family.before)
    assert tok.unk_token_id not in ends_of(name) or tok.unk_token == tok.eos_token
    assert tok.eos_token in family.ends
    tok.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in REPLIES.values():
        assert again(text)["input_ids"] == tok(text)["input_ids"]
        assert again.decode(again(text)["input_ids"], skip_special_tokens=True).strip() == text.strip()
    if name in CHATS:
        assert again.apply_chat_template([USER, *MORE], return_dict=False) == ids_of(name, [USER, *MORE])


@pytest.mark.parametrize(("name", "talk"), [(n, t) for n in CHATS for t in TALKS if t != "system" or n in BRIEF])
def test_a_prompt_is_what_inference_sees(name: str, talk: str) -> None:
    messages = TALKS[talk]
    prompt = render_of(tokenizer(name))(messages)
    assert isinstance(prompt, str)
    assert encode_prompts(tokenizer(name), [prompt], ROOM) == [ids_of(name, messages, prompt=True)]


@pytest.mark.parametrize("name", ["gemma2", "mistral1", "mistral3", "llama2"])
def test_a_conversation_that_a_template_refuses_is_refused(name: str) -> None:
    render = render_of(tokenizer(name))
    for messages in ([USER, USER],) if name in BRIEF else ([USER, USER], TALKS["system"]):
        with pytest.raises(ValueError, match="refuses"):
            render(messages)


@pytest.mark.parametrize("name", PLAIN)
def test_a_prompt_without_a_template_is_read_as_any_text(name: str) -> None:
    assert render_of(tokenizer(name)) is render_turns
    for text in (Q, " Why?", "Größe 你好", str(render_turns(TALKS["more"]))):
        assert encode_prompts(tokenizer(name), [text], ROOM) == [read_ids(name, text)]


@pytest.mark.parametrize("reply", REPLIES)
@pytest.mark.parametrize(
    ("name", "talk"), [(n, t) for n in CHATS for t in TALKS if t != "system" or FAMILIES[n].system]
)
def test_a_reply_is_what_the_template_writes(name: str, talk: str, reply: str) -> None:
    messages, text = TALKS[talk], REPLIES[reply]
    (sample,) = encode_pairs(tokenizer(name), [render_of(tokenizer(name))(messages)], [text], ROOM)
    check(name, sample, ids_of(name, messages, prompt=True), ids_of(name, [*messages, said(text)]), text)


@pytest.mark.parametrize("name", PLAIN)
def test_a_reply_without_a_template_goes_on_where_the_prompt_ends(name: str) -> None:
    for prompt in (Q, str(render_turns([USER]))):
        for text in REPLIES.values():
            (sample,) = encode_pairs(tokenizer(name), [prompt], [text], ROOM)
            check(name, sample, read_ids(name, prompt), read_ids(name, prompt + text), text)


@pytest.mark.parametrize("name", CHATS)
def test_reasoning_is_kept_in_the_reply_and_as_the_template_has_it_before(name: str) -> None:
    """Qwen3 and DeepSeek-R1 drop it from earlier turns, the latter from the last one too; but that is what we teach."""
    why = "<think>\nI add.\n</think>\n\nFour." if name == "qwen3" else "I add.\n</think>\n\nFour."
    messages = [USER, said(why), MORE[1]]
    (sample,) = encode_pairs(tokenizer(name), [render_of(tokenizer(name))(messages)], [why], ROOM)
    check(name, sample, ids_of(name, messages, prompt=True), ids_of(name, [*messages, said(why)]), why)
    text = tokenizer(name).decode(sample.tokens)
    assert text.count("I add.") == (1 if name in ("qwen3", "deepseek_r1") else 2)


def test_a_system_message_that_is_dropped_later_is_in_the_prompt() -> None:
    """Mistral v3 shows it to a model that is to answer, and no longer once it has answered."""
    tok, messages = tokenizer("mistral3"), TALKS["system"]
    (sample,) = encode_pairs(tok, [render_of(tok)(messages)], ["The answer is 4."], ROOM)
    assert sample.tokens[: sample.prompt_length] == ids_of("mistral3", messages, prompt=True)
    assert decode(tok, [sample.tokens[sample.prompt_length :]]) == ["The answer is 4."]
    assert sample.tokens[-1] == tok.eos_token_id


@pytest.mark.parametrize("name", FAMILIES)
def test_one_question_is_one_prompt_in_every_kind_of_record(name: str, tmp_path: Path) -> None:
    tok, pair = tokenizer(name), {"chosen": [USER, said("It is 4.")], "rejected": [USER, said("No.")]}
    asked = {"question": Q, "answer": "4"}
    for rows in (
        [{"prompt": Q, **pair}] * 4,
        [asked, {"question": Q, "chosen": "4", "rejected": "5"}, asked | {"label": True}, asked],
        [{"messages": pair["chosen"]}, pair, pair, {"messages": [USER]}],
    ):
        found: dict[str, list[int]] = {}
        for kind, row in zip(KINDS, rows, strict=True):
            (record,) = data.read(write(tmp_path / "d.jsonl", row), kind, render=render_of(tok))
            (found[kind],) = encode_prompts(tok, [record["prompt"]], ROOM)
        assert len({tuple(ids) for ids in found.values()}) == 1, tok.batch_decode(list(found.values()))
        if name in CHATS:
            assert found["prompts"] == ids_of(name, [USER], prompt=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_a_reply_are_the_reply(name: str) -> None:
    tok, family = tokenizer(name), FAMILIES[name]
    for text in ("The answer is 4.", "Größe 你好, été 🙂", "Yes.\nIt is: 4."):
        if name == "xglm":  # It knows no line breaks.
            text = text.replace("\n", " ")
        body = text if name in CHATS else " " + text
        for ended in (True, False):
            (sample,) = encode_pairs(tok, [render_of(tok)([USER])], [body], ROOM, [ended])
            (read,) = decode(tok, [sample.tokens[sample.prompt_length :]])
            allowed = (text,) if name in CHATS else (text, body)  # A blank of its own may be told or not.
            assert read.removeprefix(family.lead).removesuffix(family.tail) in allowed
            assert (sample.tokens[-1] in ends_of(name)) == ended


@pytest.mark.parametrize("name", FAMILIES)
def test_held_out_text_is_read_as_it_is_and_demonstrations_as_in_training(name: str, tmp_path: Path) -> None:
    tok, text = tokenizer(name), "The answer is 4."
    (sample,) = held_out_texts(write(tmp_path / "t.jsonl", {"text": f"{text} 你好"}), tok, ROOM)
    assert sample.tokens == read_ids(name, f"{text} 你好")
    path = write(tmp_path / "d.jsonl", {"messages": [USER, said(text)]})
    (record,) = data.read(path, "demonstrations", render=render_of(tok))
    assert held_out_texts(path, tok, ROOM) == encode_pairs(tok, [record["prompt"]], [record["response"]], ROOM)
    if name in CHATS:
        (sample,) = held_out_texts(path, tok, ROOM)
        check(name, sample, ids_of(name, [USER], prompt=True), ids_of(name, [USER, said(text)]), text)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A folder with a reward model of a family."""
    made: dict[str, str] = {}

    def folder(name: str) -> str:
        if name not in made:
            path = tmp_path_factory.mktemp("judges") / name
            model = scalar_from(policy(name), torch.Generator().manual_seed(0))
            model.set_statistics(torch.tensor([-1.0, 1.0]))  # As `rlhf-train reward` leaves it.
            model.save(path)
            made[name] = str(path)
        return made[name]

    return folder


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ("qwen2", "qwen2"), ("qwen2", "llama2"), ("llama3", "gemma2"), ("gemma2", "mistral3"), ("phi3", "qwen3"),
        ("deepseek_r1", "command_r"), ("smollm2", "glm4"), ("command_r", "phi3"), ("olmo2", "llama3"),
        ("mistral1", "zephyr"),  # one vocabulary, two templates
        ("qwen2", "pythia"), ("pythia", "zephyr"), ("pythia", "opt"),  # one side has no template
    ],
)  # fmt: skip
def test_a_reward_model_reads_what_it_was_trained_on(
    mine: str, theirs: str, judge: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, path = ["The answer is 4.", "Yes, it"], tmp_path / "d.jsonl"
    write(path, *({"messages": [USER, *MORE, said(text)]} for text in texts))
    ended, samples = [True, False], {}
    for name in (mine, theirs):
        records = data.read(path, "demonstrations", render=render_of(tokenizer(name)))
        prompts, replies = [r["prompt"] for r in records], [r["response"] for r in records]
        samples[name] = encode_pairs(tokenizer(name), prompts, replies, ROOM, ended)
    rollout = Rollout(samples[mine], [not e for e in ended], [[0.0] * len(s.tokens) for s in samples[mine]])
    asked = data.read(path, "prompts", render=render_of(tokenizer(mine)))
    options: dict[str, Any] = {"max_length": ROOM, "max_tokens": 4 * ROOM, "device": torch.device("cpu")}
    reward, seen, hidden = reward_from(judge(theirs), tokenizer(mine), **options), [], ScalarModel.hidden

    def reads(self: ScalarModel, packed: Packed) -> torch.Tensor:
        seen.extend(ids.tolist() for ids in packed.input_ids.split(packed.lengths))
        return hidden(self, packed)

    monkeypatch.setattr(ScalarModel, "hidden", reads)
    assert reward(rollout, asked).isfinite().all()
    told = [tokenizer(theirs).decode(ids) for ids in seen]
    assert told == [tokenizer(theirs).decode(sample.tokens) for sample in samples[theirs]]
    assert seen == [sample.tokens for sample in samples[theirs]]
    assert [ids[-1] in ends_of(theirs) for ids in seen] == ended
