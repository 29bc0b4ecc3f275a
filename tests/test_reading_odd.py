"""Templates, tokenizers and rows that are odd in the ways of published ones, and what each is to give."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import FAMILIES, policy, templates, tokenizer
from tests.trainer_worlds import write
from trainer import data, evaluation, grpo, pipeline, ppo, recipe
from trainer.chat import render_of
from trainer.inspect_data import inspect
from trainer.inspect_text import findings
from trainer.models import load_scalar, scalar_from
from trainer.packing import Sample
from trainer.prompt import conversation
from trainer.reward_fields import read_prompts
from trainer.rewards import with_end
from trainer.session import Session
from trainer.sft import SFTConfig
from trainer.tax import held_out_texts
from trainer.text import encode_pairs, encode_prompts, ends
from trainer.tiny import byte_tokenizer, tiny_policy

USER = {"role": "user", "content": "What is 2 + 2?"}
CPU = torch.device("cpu")


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


@pytest.mark.parametrize("name", ["llama_base", "mistral1", "xglm", "pythia"])
@pytest.mark.parametrize(("prompt", "reply"), [("The answer is: ", "4"), ("The answe", "r is 4"), ("2 +", " 2")])
def test_nothing_is_put_between_prompt_and_reply(name: str, prompt: str, reply: str):
    tok = tokenizer(name)
    (one,) = encode_pairs(tok, [prompt], [reply], 99)
    whole = tok.decode(tok(prompt + reply)["input_ids"], skip_special_tokens=True)
    assert tok.decode(one.tokens, skip_special_tokens=True).strip() == whole.strip()
    assert one.tokens[: one.prompt_length] == encode_prompts(tok, [prompt], 99)[0]


def test_nulls_in_messages_are_absent(tmp_path: Path):
    tok = tokenizer("smollm2")
    strict = "{% for m in messages %}{% if 'tool_calls' in m %}{{ m.tool_calls | length }}{% endif %}{% endfor %}"
    tok = FAMILIES["smollm2"].make()
    tok.chat_template = strict + tok.chat_template
    row = {"messages": [USER | {"name": None}, said("4") | {"tool_calls": None}]}
    (record,) = data.read(write(tmp_path / "d.jsonl", [row]), "demonstrations", render=render_of(tok))
    assert record["prompt"].messages == (USER,)


def test_blank_lines_of_held_out_text_are_left_out(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", [{"text": "It is 4."}, {"text": ""}, {"text": "So it is."}])
    for name in ("pythia", "llama3"):
        assert len(held_out_texts(path, tokenizer(name), 99)) == 2


@pytest.mark.parametrize(("name", "given"), [("glm4", 2), ("llama3", 1), ("pythia", 1)])
def test_what_stands_before_a_text_is_not_asked_of_the_model(tmp_path: Path, name: str, given: int):
    (sample,) = held_out_texts(write(tmp_path / "t.jsonl", [{"text": "It is 4."}]), tokenizer(name), 99)
    assert sample.prompt_length == given


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


@pytest.mark.parametrize("room", [1, 2, 3])
def test_no_room_is_kept_too(room: int):
    for name in ("glm4", "llama_base", "pythia"):
        (prompt,) = encode_prompts(tokenizer(name), ["What is it?"], room)
        assert len(prompt) == room
        (one,) = encode_pairs(tokenizer(name), ["What is it?"], ["It is 4."], room)
        assert one.prompt_length <= len(one.tokens) <= room


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


def judge(folder: Path, name: str, **config: Any) -> str:
    made = scalar_from(policy(name), torch.Generator().manual_seed(0))
    made.set_statistics(torch.tensor([-1.0, 1.0]))
    for key, value in config.items():
        setattr(made.model.config, key, value)
    made.save(folder)
    return str(folder)


@pytest.mark.parametrize("option", ["reward", "gold_reward", "judge"])
def test_a_judge_that_cannot_read_a_prompt_says_so_before_any_work(tmp_path: Path, option: str):
    path = write(
        tmp_path / "d.jsonl", [{"prompt": "Hi"}, {"prompt": [{"role": "system", "content": "Be brief."}, USER]}]
    )
    name = judge(tmp_path / "judge", "gemma2")
    with pytest.raises(ValueError, match=rf"^{option}: .* cannot read .*d\.jsonl line 2: the chat template refuses"):
        read_prompts(path, [(option, name)], render=render_of(tokenizer("qwen2")))


def test_a_value_model_has_positions_too(tmp_path: Path):
    tok = byte_tokenizer(["What is it?"], 280)
    tiny_policy(tok, 0, hidden=32, layers=1).save(tmp_path / "m")
    made = scalar_from(tiny_policy(tok, 0, hidden=32, layers=1), torch.Generator().manual_seed(0))
    made.model.config.max_position_embeddings = 40
    made.save(tmp_path / "v")
    path = write(tmp_path / "d.jsonl", [{"prompt": "What is it? " * 9}] * 2)
    told: list[str] = []
    cfg = ppo.PPOConfig(
        model=str(tmp_path / "m"), value_model=str(tmp_path / "v"), data=path, out=tmp_path / "o", batch_size=2,
        reward="tests.trainer_worlds:share_of_a", max_new_tokens=4, quiet=True,
    )  # fmt: skip
    loop = ppo.rl.Loop(cfg, ppo.PPO(cfg), told.append)
    assert loop.cfg.max_length == 40
    assert max(map(len, loop.prompts)) == 36


def test_policies_that_read_other_tokens_pay_no_tax(tmp_path: Path):
    """One and the same model with a template and without one; and once more with fewer positions."""
    for folder in ("chat", "plain"):
        policy("qwen2").save(tmp_path / folder)
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    path = write(tmp_path / "d.jsonl", [{"messages": [USER, said("It is 4.")]}] * 4)
    cut = tmp_path / "cut"
    policy("qwen2").save(cut)
    config = json.loads((cut / "config.json").read_text())
    (cut / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    texts = write(tmp_path / "t.jsonl", [{"text": "It is 4, and so on. " * 9}])
    for base, lm_data, verdicts in (("plain", path, 0), ("cut", texts, 1)):
        models = {"model": str(tmp_path / "chat"), "base": str(tmp_path / base)}
        cfg = evaluation.EvalConfig(lm_data=lm_data, out=tmp_path / f"o{base}", quiet=True, **models)
        found = evaluation.run(cfg)
        assert len(found["verdicts"]) == verdicts
    assert abs(found["language_model"]["policy"]["tax"].value) < 1e-6


def test_a_run_that_an_earlier_version_began_is_told(tmp_path: Path):
    path = write(tmp_path / "d.jsonl", [{"prompt": "p", "response": "r"}])
    session = Session(SFTConfig(data=path, out=tmp_path / "o", quiet=True), None, "sft")
    with pytest.raises(ValueError, match="was begun by an earlier version, which read prompts and replies"):
        session._compare({"config": {}, "inputs": {}})


def test_a_reward_model_reads_the_end_that_it_has_learnt():
    tok = tokenizer("gemma2")
    turn, eos = ends(tok)[-1], tok.eos_token_id
    assert turn != eos
    assert with_end(Sample([5, 6, eos], 1), turn) == Sample([5, 6, turn], 1)


def test_grpo_knows_its_file_and_line_where_a_reward_model_refuses(tmp_path: Path):
    policy("smollm2").save(tmp_path / "m")
    path = write(tmp_path / "d.jsonl", [{"prompt": "Hi"}] * 3 + [{"prompt": "What does <bos> mean?"}])
    cfg = grpo.GRPOConfig(
        model=str(tmp_path / "m"), data=path, out=tmp_path / "o", reward=judge(tmp_path / "j", "gemma2"),
        max_new_tokens=4, quiet=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"d\.jsonl line 4: a message holds the special token '<bos>'"):
        grpo.train(cfg)


def test_a_pipeline_goes_on_with_the_day_on_which_it_began(tmp_path: Path):
    options = {"data": "d.jsonl", "template_date": "2001-02-03"}
    began = recipe.Recipe(tmp_path, None, [recipe.Step("teach", "sft", options)], {}, {})
    work = pipeline.Work("teach", "sft", None, SFTConfig(data="d.jsonl"))  # type: ignore[arg-type]
    assert pipeline._on_its_day(work, began).config.template_date == "2001-02-03"
    other = pipeline.Work("other", "sft", None, SFTConfig(data="d.jsonl"))  # type: ignore[arg-type]
    assert pipeline._on_its_day(other, began) is other


def test_inspect_finds_prompts_that_were_rendered_before(tmp_path: Path):
    tok = tokenizer("smollm2")
    policy("smollm2").save(tmp_path / "m")
    done = tok.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    path = write(tmp_path / "d.jsonl", [{"prompt": "Hi", "response": "a"}, {"prompt": done, "response": "b"}])
    facts = inspect(path, tokenizer=str(tmp_path / "m"), with_baselines=False)
    assert facts["markup"]["prompts"] == 1
    assert any("first in line 2. Where they were rendered before, train with" in text for text in findings(facts))
    assert "markup" not in inspect(path, with_baselines=False)
