"""One row through every stage: whatever a model is given there begins with the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import policy, tokenizer
from trainer.data.packing import Packed
from trainer.evaluation import stage as evaluation
from trainer.models.policy import Policy, ScalarModel
from trainer.stages import reward_model, sft
from trainer.stages.preference import dpo, kto
from trainer.stages.rl import grpo, ppo
from trainer.stages.rl import stage as rl_stage

ASK, SAID = "What is 2 + 2?", [{"role": "assistant", "content": text} for text in ("It is 4.", "No.")]
USER = {"role": "user", "content": ASK}
ROWS = {
    "UltraFeedback": {"prompt": ASK, "chosen": [USER, SAID[0]], "rejected": [USER, SAID[1]]},
    "a text and two replies": {"prompt": ASK, "chosen": "It is 4.", "rejected": "No."},
    "a transcript": {
        "chosen": f"\n\nHuman: {ASK}\n\nAssistant: It is 4.",
        "rejected": f"\n\nHuman: {ASK}\n\nAssistant: No.",
    },
}
STAGES: dict[str, tuple[Any, Any]] = {
    "sft": (sft.SFTConfig, sft.sft),
    "reward": (reward_model.RewardConfig, reward_model.reward_model),
    "ppo": (ppo.PPOConfig, rl_stage.ppo),
    "grpo": (grpo.GRPOConfig, rl_stage.grpo),
    "dpo": (dpo.DPOConfig, dpo.dpo),
    "ipo": (dpo.IPOConfig, dpo.ipo),
    "orpo": (dpo.ORPOConfig, dpo.orpo),
    "simpo": (dpo.SimPOConfig, dpo.simpo),
    "kto": (kto.KTOConfig, kto.kto),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    policy("smollm2").save(folder := tmp_path_factory.mktemp("models") / "chat")
    return str(folder)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Every sequence that a policy, a reward or a value model is given, its first tokens at least."""
    found: list[list[int]] = []
    states, hidden = Policy.states, ScalarModel.hidden

    def policy_reads(self: Policy, **inputs: Any) -> torch.Tensor:
        ids, cu = inputs["input_ids"], inputs.get("cu_seq_lens_q")
        if cu is not None:
            found.extend(x.tolist() for x in ids[0].split((cu[1:] - cu[:-1]).tolist()))
        elif ids.shape[1] > 1:  # the first step of sampling
            found.extend(ids.tolist())
        return states(self, **inputs)

    def scalar_reads(self: ScalarModel, packed: Packed) -> torch.Tensor:
        found.extend(x.tolist() for x in packed.input_ids.split(packed.lengths))
        return hidden(self, packed)

    monkeypatch.setattr(Policy, "states", policy_reads)
    monkeypatch.setattr(ScalarModel, "hidden", scalar_reads)
    return found


def begin_alike(read: list[list[int]]) -> None:
    prompt = tokenizer("smollm2").apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    given = [ids for ids in read if len(ids) > 4]  # A model is tried on four tokens where it is loaded.
    assert given
    assert all(ids[: len(prompt)] == prompt for ids in given)


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_reads_the_prompt_as_all_others_do(
    name: str, form: str, model: str, tmp_path: Path, read: list[list[int]]
) -> None:
    config, train = STAGES[name]
    (path := tmp_path / "d.jsonl").write_text((json.dumps(ROWS[form]) + "\n") * 2)
    options: dict[str, Any] = {"model": model, "data": path, "out": tmp_path / "o", "steps": 1, "batch_size": 2}
    if name in ("ppo", "grpo"):
        options |= {"reward": "tests.support.small:share_of_a", "max_new_tokens": 4}
    if name == "reward":
        options["calibration_new_tokens"] = 4
    train(config(quiet=True, **options))
    begin_alike(read)


def test_eval_reads_it_so_too(model: str, tmp_path: Path, read: list[list[int]]) -> None:
    (path := tmp_path / "d.jsonl").write_text(json.dumps(ROWS["UltraFeedback"]) + "\n")
    (tasks := tmp_path / "gsm.jsonl").write_text(json.dumps({"question": ASK, "answer": "4"}) + "\n")
    evaluation.evaluate(
        evaluation.EvalConfig(
            model=model,
            data=path,
            judge="tests.support.small:share_of_a",
            lm_data=path,
            tasks=(tasks,),
            out=tmp_path / "o",
            max_new_tokens=4,
            quiet=True,
        )
    )
    begin_alike(read)
    assert len([ids for ids in read if len(ids) > 4]) == 3
