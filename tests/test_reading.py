"""What a model reads: ids that exist, ends of every kind, cuts, days, and prompts as people write them.

Families of tokenizers are in ``test_families.py``; here is what they have in common.
"""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.families import policy, tokenizer
from tests.trainer_worlds import write
from trainer import data
from trainer.chat import ChatTemplate, render_for, render_of
from trainer.models import ScalarModel, load_policy, load_scalar, scalar_from
from trainer.packing import Sample
from trainer.prompt import Prompt, asked, render_turns
from trainer.rewards import reward_from
from trainer.rollout import Rollout, sample
from trainer.text import encode, encode_pairs, encode_prompts
from trainer.tiny import byte_tokenizer, tiny_policy

CPU = torch.device("cpu")
USER = [{"role": "user", "content": "What is 2 + 2?"}]
TURNS = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What is 2 + 2?\n\nAssistant:"


@pytest.fixture
def plain() -> Any:
    return byte_tokenizer(["What is 2 + 2? It is 4."], 280)


def padded(rows: int) -> Any:
    """A policy whose head has more rows than its tokenizer has tokens, and likes them."""
    tok = byte_tokenizer(["ab"], 258)
    made = tiny_policy(tok, 0, hidden=32, layers=1)
    made.model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        made.model.lm_head.weight[len(tok) :] = 3 * made.model.lm_head.weight[: rows - len(tok)]
    return type(made)(made.model, tok)


@pytest.mark.parametrize("sampler", ["cached", "generate"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_beyond_the_tokens_are_nobody(sampler: Any, temperature: float):
    mine = padded(400)
    said = sample(
        mine, [[40, 41]] * 32, max_new_tokens=8, generator=torch.Generator().manual_seed(0), sampler=sampler,
        temperature=temperature,
    )  # fmt: skip
    assert max(max(s.tokens) for s in said.samples) < len(mine.tokenizer)
    packed = said.pack("cpu")
    with torch.no_grad():
        stats = mine.stats(packed)
        kept = (mine.hidden(packed) @ mine.weight.T)[:, : len(mine.tokenizer)].log_softmax(-1)
    torch.testing.assert_close(
        stats.logp[packed.mask], kept.gather(1, packed.targets.clamp(0)[:, None])[packed.mask, 0]
    )
    if temperature:
        assert said.sampler_delta(packed, stats.logp) < 1e-4


def test_a_reward_model_is_not_asked_about_ids_that_it_has_not(tmp_path: Path):
    tok = byte_tokenizer(["ab"], 258)
    judge = scalar_from(tiny_policy(tok, 0, hidden=32, layers=1), torch.Generator().manual_seed(0))
    judge.set_statistics(torch.tensor([-1.0, 1.0]))
    judge.save(tmp_path)
    reward = reward_from(str(tmp_path), tok, max_length=64, max_tokens=512, device=CPU)
    beyond = Rollout([Sample([40, 41, len(tok) + 3, 1], 1)], [False], [[0.0] * 3])
    with pytest.raises(
        ValueError, match=rf"has {len(tok)} rows of embeddings, and a response holds the id {len(tok) + 3}"
    ):
        reward(beyond, [{"prompt": "a", "extra": {}}])


@pytest.mark.parametrize("sampler", ["cached", "generate"])
def test_a_response_stops_at_each_end(tmp_path: Path, sampler: Any):
    tiny_policy(byte_tokenizer(["ab"], 258), 0, hidden=32, layers=1).save(tmp_path)
    options = json.loads((file := tmp_path / "generation_config.json").read_text())
    file.write_text(json.dumps(options | {"eos_token_id": [7, 1, 9]}))
    mine = load_policy(str(tmp_path))
    assert mine.ends == [1, 7, 9]
    source = torch.Generator().manual_seed(0)
    said = sample(mine, [[40, 41]] * 64, max_new_tokens=100, generator=source, sampler=sampler)
    last = [said.response(i)[-1] for i in range(64)]
    assert {1, 7, 9} == set(last) & {1, 7, 9}
    assert not any({1, 7, 9} & set(said.response(i)[:-1]) for i in range(64))
    assert said.truncated == [x not in (1, 7, 9) for x in last]


@pytest.mark.parametrize("bad", [999, -1])
def test_an_end_that_no_row_stands_for_is_refused(tmp_path: Path, bad: int):
    tiny_policy(byte_tokenizer(["ab"], 258), 0, hidden=32, layers=1).save(tmp_path)
    options = json.loads((file := tmp_path / "generation_config.json").read_text())
    file.write_text(json.dumps(options | {"eos_token_id": [1, bad]}))
    with pytest.raises(ValueError, match=rf"has the id {bad}, and the embedding has 258 rows"):
        load_policy(str(tmp_path))


def test_the_end_of_a_turn_is_told_to_whoever_loads_the_model(tmp_path: Path):
    """Gemma's tokenizer ends sequences with one token and its template turns with another."""
    made = policy("gemma2")
    made.model.generation_config.eos_token_id = made.tokenizer.eos_token_id
    made.save(tmp_path / "base")
    mine = load_policy(str(tmp_path / "base"))
    turn = mine.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert set(mine.ends) == {mine.tokenizer.eos_token_id, turn}
    mine.save(tmp_path / "trained")
    assert turn in json.loads((tmp_path / "trained" / "generation_config.json").read_text())["eos_token_id"]


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


def test_functions_see_what_people_wrote():
    seen: list[Any] = []
    tok, row = tokenizer("smollm2"), {"prompt": render_of(tokenizer("smollm2")).text("What is 2 + 2?"), "extra": {}}
    from trainer.rewards import _from_function

    def score(prompts: Sequence[str], responses: Sequence[str], extras: Any) -> list[float]:
        seen.extend(zip(prompts, responses, strict=True))
        return [0.0] * len(prompts)

    (ids,) = encode_pairs(tok, [row["prompt"]], ["It is 4."], 900)
    _from_function(score, "f", tok)(Rollout([ids], [False], [[0.0]]), [row])
    ((prompt, response),) = seen
    assert (prompt, response) == ("What is 2 + 2?", "It is 4.")
    assert isinstance(prompt, Prompt)
    assert prompt.messages == tuple(USER)


@pytest.mark.parametrize("own", [True, False])
def test_a_reward_model_of_others_is_read_where_its_own_forward_reads(tmp_path: Path, own: bool):
    """Transformers reads the last token that is not padding, of the whole rendered conversation."""
    judge = scalar_from(policy("smollm2"), torch.Generator().manual_seed(0))
    judge.model.config.pad_token_id = judge.tokenizer.eos_token_id
    if own:
        judge.set_statistics(torch.tensor([-1.0, 1.0]))
    judge.save(tmp_path)
    again = load_scalar(str(tmp_path))
    assert isinstance(again, ScalarModel)
    assert again.own is own
    tok = again.tokenizer
    prompt = render_of(tok)(USER)
    (mine,) = encode_pairs(tok, [prompt], ["It is 4."], 900)
    rollout = Rollout([mine], [False], [[0.0] * 9])
    reward = reward_from(str(tmp_path), tok, max_length=900, max_tokens=999, device=CPU)
    (got,) = reward(rollout, [{"prompt": prompt, "extra": {}}])
    talk = [*USER, {"role": "assistant", "content": "It is 4."}]
    ids = tok.apply_chat_template(talk, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        theirs = again.model(input_ids=ids, use_cache=False).logits[0, 0]
        ends = again.raw_scores(mine_packed(mine))[0]
    torch.testing.assert_close(got, ends if own else theirs)


def mine_packed(one: Sample) -> Any:
    from trainer.packing import pack

    return pack([one])


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


def test_tokenizers_that_read_alike_are_told_from_those_that_only_share_words(tmp_path: Path):
    from trainer.tokens import same

    assert same(tokenizer("smollm2"), tokenizer("smollm2"))
    tokenizer("smollm2").save_pretrained(tmp_path)
    twin = AutoTokenizer.from_pretrained(tmp_path)
    assert same(tokenizer("smollm2"), twin)
    twin.chat_template = None
    assert not same(tokenizer("smollm2"), twin)


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
