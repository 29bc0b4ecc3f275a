"""What `inspect` shows first."""

from __future__ import annotations

from pathlib import Path

from tests.families import policy, tokenizer
from tests.support.small import write
from trainer.inspect.command import inspect
from trainer.inspect.screen import findings

USER = {"role": "user", "content": "What is 2 + 2?"}


def test_inspect_finds_prompts_that_were_rendered_before(tmp_path: Path):
    tok = tokenizer("smollm2")
    policy("smollm2").save(tmp_path / "m")
    done = tok.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    path = write(tmp_path / "d.jsonl", [{"prompt": "Hi", "response": "a"}, {"prompt": done, "response": "b"}])
    facts = inspect(path, tokenizer=str(tmp_path / "m"), with_baselines=False)
    assert facts["markup"]["prompts"] == 1
    assert any("first in line 2. Where they were rendered before, train with" in text for text in findings(facts))
    assert "markup" not in inspect(path, with_baselines=False)
