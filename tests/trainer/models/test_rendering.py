"""How conversations are read is the model's to say."""

from __future__ import annotations

from pathlib import Path

from tests.support.small import small_policy
from tests.trainer.data.chat.test_chat import STABLE, USER
from trainer.data import reading as data
from trainer.models.rendering import render_for


def test_pitfall_21_the_model_decides_how_conversations_are_read(tmp_path: Path) -> None:
    policy = small_policy()
    policy.save(tmp_path / "plain" / "model")
    policy.tokenizer.chat_template = STABLE
    policy.save(tmp_path / "chat" / "model")
    assert render_for(str(tmp_path / "plain"))([USER]) == "\n\nHuman: Hi?\n\nAssistant:"
    assert render_for(str(tmp_path / "chat"))([USER]) == "<s>user: Hi?<eos><s>assistant: "
    assert render_for("tiny") is data.render_turns
