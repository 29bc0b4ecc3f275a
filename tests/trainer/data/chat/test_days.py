"""The day that a template writes is that of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.small import write
from trainer.data import chat
from trainer.data.chat import render_of
from trainer.evaluation.stage import EvalConfig
from trainer.models.tiny import tiny_policy
from trainer.run import fingerprint
from trainer.stages import sft
from trainer.training.session import Session

USER = [{"role": "user", "content": "What is 2 + 2?"}]


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
