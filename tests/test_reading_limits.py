"""What is cut where, what positions a model has, and the day that a template writes: limits of what a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from tests.families import tokenizer
from tests.trainer_worlds import write
from trainer import chat, fingerprint, grpo, kto, pairs, preference, sft
from trainer.chat import render_of
from trainer.evaluation import EvalConfig
from trainer.log import RunLog
from trainer.session import Session
from trainer.text import encode_pairs, encode_prompts
from trainer.tiny import byte_tokenizer, tiny_policy

USER = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.fixture
def plain() -> Any:
    return byte_tokenizer(["What is 2 + 2? It is 4."], 280)


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


def alike(method: Any, rows: Sequence[dict[str, Any]], folder: Path, **options: Any) -> tuple[int, list[str]]:
    """Units that a preference stage trains on where its sequences have 32 tokens, and its notes."""
    tiny_policy(byte_tokenizer(["words"], 270), 0, hidden=32, layers=1).save(folder / "m")
    cfg = type(method.cfg)(**vars(method.cfg) | options) if hasattr(method, "cfg") else options.pop("cfg")
    told: list[str] = []
    loop = preference.Loop(cfg, method, told.append)
    assert loop.train.reference is None or len(loop.train.reference.known) == len(loop.train.replies.samples)
    return len(loop.train.replies.units), told


LONG = "the same beginning, word for word, " * 3
CUT = [{"prompt": f"q{i}", "chosen": f"{LONG}good", "rejected": f"{LONG}bad"} for i in range(6)]
SHORT = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(6, 8)]


def test_pairs_that_are_alike_once_cut_are_left_out_and_told(tmp_path: Path):
    path = write(tmp_path / "d.jsonl", [*CUT, *SHORT])
    options: dict[str, Any] = {
        "model": str(tmp_path / "m"), "data": path, "out": tmp_path / "o", "steps": 1, "batch_size": 8,
        "max_length": 32, "quiet": True,
    }  # fmt: skip
    cfg = pairs.DPOConfig(**options)
    kept, told = alike(pairs.Pairs("dpo", 32, lambda *a: None), [], tmp_path, cfg=cfg)  # type: ignore[arg-type,return-value]
    assert kept == 2
    assert any("6 of 8 have replies of different rank that read alike, cut to 32 tokens" in x for x in told)
    method = kto.KTO(kto.KTOConfig(**options))
    kept, told = alike(method, [], tmp_path)
    assert kept == 4
    assert any("6 of 8 have replies" in x for x in told)


def test_nothing_but_such_pairs_is_refused(tmp_path: Path):
    path = write(tmp_path / "d.jsonl", CUT)
    cfg = pairs.DPOConfig(
        model=str(tmp_path / "m"), data=path, out=tmp_path / "o", steps=1, batch_size=8, max_length=32, quiet=True
    )
    with pytest.raises(ValueError, match="data: the replies to each prompt are identical as the model reads them"):
        alike(pairs.Pairs("dpo", 32, lambda *a: None), [], tmp_path, cfg=cfg)  # type: ignore[arg-type,return-value]


def test_responses_longer_than_a_sequence_are_refused(tmp_path: Path):
    path = write(tmp_path / "d.jsonl", [{"prompt": "p"}])
    options: dict[str, Any] = {"data": path, "out": tmp_path / "o", "quiet": True, "reward": "exact_answer"}
    for longest in (1024, 2048):
        with pytest.raises(ValueError, match=f"max_new_tokens: got {longest}, want less than max_length=1024"):
            grpo.train(grpo.GRPOConfig(max_new_tokens=longest, **options))


def learned_positions(folder: Path, positions: int) -> str:
    tok = byte_tokenizer(["what is 1 + 1"], 270)
    config = GPT2Config(vocab_size=len(tok), n_positions=positions, n_embd=32, n_layer=1, n_head=2, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


def test_no_sequence_is_longer_than_the_positions_of_the_model(tmp_path: Path):
    model = learned_positions(tmp_path / "m", 64)
    row = {"prompt": "what is 1 + 1? " * 9, "response": "it is 2. " * 9, "answer": "2"}
    path = write(tmp_path / "d.jsonl", [row] * 8)
    told: list[str] = []
    options: dict[str, Any] = {"model": model, "data": path, "steps": 1, "batch_size": 2, "quiet": True}
    log = RunLog(tmp_path / "sft", quiet=True)
    log.note = told.append  # type: ignore[method-assign]
    sft.train(sft.SFTConfig(out=tmp_path / "sft", **options), log)
    assert f"max_length: got 1024, and {model} has 64 positions: sequences are cut to 64" in told
    more: dict[str, Any] = options | {"reward": "exact_answer", "num_generations": 2}
    grpo.train(grpo.GRPOConfig(out=tmp_path / "grpo", max_new_tokens=32, **more))
    with pytest.raises(ValueError, match="max_new_tokens: got 64, want less than the 64 positions"):
        grpo.train(grpo.GRPOConfig(out=tmp_path / "long", max_new_tokens=64, **more))


DATED = (
    "{{ 'Today: ' + strftime_now('%d %b %Y %H:%M:%S') }}{% for m in messages %}"
    "{{ m.role + ': ' + m.content + '<eos>' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_day_in_a_template_is_that_of_the_run(tmp_path: Path, plain: Any, monkeypatch: pytest.MonkeyPatch):
    plain.chat_template = DATED
    assert render_of(plain, date="2001-02-03")(USER).startswith("Today: 03 Feb 2001 00:00:00user: What")
    made = tiny_policy(plain, 0, hidden=32, layers=1)
    made.save(tmp_path / "dated")
    plain.chat_template = DATED.replace("strftime_now('%d %b %Y %H:%M:%S')", "'never'")
    made.save(tmp_path / "other")
    path = write(tmp_path / "d.jsonl", [{"messages": [*USER, {"role": "assistant", "content": "4"}]}])
    options: dict[str, Any] = {"data": path, "out": tmp_path / "o", "steps": 1, "quiet": True}

    def config(name: str, **more: Any) -> sft.SFTConfig:
        return sft.SFTConfig(model=str(tmp_path / name), **options, **more)

    assert config("other").template_date == chat.today().isoformat()
    assert fingerprint.inputs(config("dated", template_date="2001-02-03"))["template_date"] == "2001-02-03"
    assert "template_date" not in fingerprint.inputs(config("other"))
    for name, fails in (("other", False), ("dated", True)):
        with Session(cfg := config(name), None, "sft") as session:
            saved = dict(session._about)
        monkeypatch.setattr(chat, "today", lambda: chat.day(2001, 2, 3))
        session = Session(config(name), None, "sft")
        session._about = saved | {"config": saved["config"] | {"template_date": "2001-02-03"}}
        session._about["inputs"] = fingerprint.inputs(config(name))
        if fails:
            with pytest.raises(
                ValueError, match=f"template_date: {cfg.template_date} at the checkpoint, 2001-02-03 now"
            ):
                session._compare(saved)
        else:
            session._compare(saved)
        monkeypatch.undo()


@pytest.mark.parametrize("value", ["tomorrow", "2026-13-01", 7])
def test_what_is_no_day_is_refused(value: Any):
    with pytest.raises(ValueError, match=r"template_date: got .*, want a day such as 2026-11-28"):
        EvalConfig(model="tiny", template_date=value)
