"""The load-balancing loss of a mixture of experts: added where a config asks for it, or said to be missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import MixtralConfig, MixtralForCausalLM

import rlhf_kernels as rk
from tests.support import model_families as families
from tests.support.small import LETTERS, lines, share_of_a, write
from trainer.data.encoding import encode_pairs
from trainer.models import router
from trainer.models.loading import load_policy
from trainer.models.policy import Policy
from trainer.models.tiny import word_tokenizer
from trainer.run.log import RunLog
from trainer.stages import reward_model, sft
from trainer.stages.preference import dpo
from trainer.stages.rl import grpo
from trainer.stages.rl import stage as rl_stage

FACTOR = 0.5
PAIRS = [(f"{a} {b}", f"{b} {a} {a}", f"{b}") for a, b in zip(LETTERS, LETTERS[3:], strict=False)][:6]


def mixture(path: Path, **options: Any) -> str:
    """A small Mixtral whose config asks for the loss."""
    tokenizer = word_tokenizer(LETTERS)
    torch.manual_seed(0)
    asks = {"output_router_logits": True, "router_aux_loss_coef": FACTOR} | options
    sizes = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_local_experts": 4, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0,
        "bos_token_id": None,
    }  # fmt: skip
    MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), **sizes, **asks)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def run(train: Any, config: Any, path: Path, **options: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of metrics, and notes, with the table of the results as the last one."""
    cfg = config(out=path / "out", steps=1, warmup_steps=0, quiet=True, **options)
    log, notes = RunLog(cfg.out, quiet=True), list[str]()
    log.note = notes.append  # type: ignore[method-assign]
    log.table = lambda _title, rows: notes.append(str(rows))  # type: ignore[method-assign]
    train(cfg, log)
    return lines(path / "out" / "metrics.jsonl"), notes


def about_routers(notes: list[str]) -> list[str]:
    return [note for note in notes if "router's load-balancing loss" in note]


def demonstrations(path: Path, count: int) -> Path:
    return write(path / "d.jsonl", ({"prompt": p, "response": r} for p, r, _ in PAIRS[:count]))


def own_losses(model: str, count: int) -> tuple[list[float], list[float], list[int]]:
    """What transformers says of each demonstration alone: its loss, its load-balancing loss; and response tokens."""
    theirs, tokenizer = MixtralForCausalLM.from_pretrained(model).eval(), load_policy(model).tokenizer
    total, aux, tokens = [], [], []
    for s in encode_pairs(tokenizer, [p for p, *_ in PAIRS[:count]], [r for _, r, _ in PAIRS[:count]], 99):
        labels = torch.tensor([[-100] * s.prompt_length + s.tokens[s.prompt_length :]])
        with torch.no_grad():
            out = theirs(input_ids=torch.tensor([s.tokens]), labels=labels)
        total.append(float(out.loss))
        aux.append(float(out.aux_loss))
        tokens.append(len(s.tokens) - s.prompt_length)
    return total, aux, tokens


@pytest.mark.parametrize("count", [1, 3])
def test_sft_has_the_loss_of_the_model_itself(tmp_path: Path, count: int) -> None:
    """Micro-batches of one sequence each: their mean, weighted by tokens, is what the step logs and minimises."""
    model = mixture(tmp_path / "model")
    total, aux, tokens = own_losses(model, count)
    options = {"model": model, "data": demonstrations(tmp_path, count), "batch_size": count, "max_tokens": 1}
    (row, *_), notes = run(sft.sft, sft.SFTConfig, tmp_path, **options)

    def mean(values: list[float]) -> float:
        return sum(x * n for x, n in zip(values, tokens, strict=True)) / sum(tokens)

    assert row["loss"] == pytest.approx(mean(total), abs=1e-5)
    assert row["aux_loss"] == pytest.approx(mean(aux), abs=1e-5)
    assert mean(aux) * FACTOR > 0.5  # without it the loss would be another
    assert about_routers(notes) == []


def test_routers_get_its_gradient() -> None:
    """That of the loss of transformers, with respect to every weight."""
    with families.quiet():
        model = families.build("mixtral", output_router_logits=True, router_aux_loss_coef=FACTOR)
    policy, ids = Policy(model, None), families.tokens(90)[:1]
    model(input_ids=ids, labels=ids).loss.backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    ours(policy, ids).loss.backward()
    assert "model.layers.0.mlp.gate.weight" in want
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-3, atol=1e-5, msg=name)


def ours(policy: Policy, ids: torch.Tensor) -> rk.LossOutput:
    def loss() -> rk.LossOutput:
        hidden = policy.states(input_ids=ids, use_cache=False)[:, :-1]
        return rk.sft_loss(hidden, policy.weight, ids[:, 1:], **policy.head)

    return router.balanced(policy, 1.0, loss)


def asking(family: str) -> bool:
    """Whether there is a word about such a loss in its model's file, and a model of it can be built."""
    file = sys.modules[getattr(transformers, families.NAMES[family]).__module__].__file__
    assert file is not None
    return "aux_loss" in Path(file).read_text(encoding="utf-8") and family not in families.NOT_TRIED


REFUSED = ("deepseek_v4", "doge")
"""Their own forward fails where router logits are asked for."""
SILENT = {"dbrx", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "jetmoe"}
"""Their own forward gives no such loss, or fails where it also gets labels."""


@pytest.mark.parametrize("family", [x for x in families.NAMES if asking(x) and x not in REFUSED])
def test_a_family_that_balances_its_experts(family: str) -> None:
    """Its loss is that of its own forward; where transformers gives none, that is said."""
    with families.quiet():
        model = families.build(family)
        text = model.config.get_text_config()
        for config in (model.config, text):
            config.output_router_logits = True
        for place in (model, text):
            for name in router.COEFFICIENTS:
                if hasattr(place, name):
                    setattr(place, name, FACTOR)
        policy, ids, notes = Policy(model, None), families.tokens(60)[:1], list[str]()
        with torch.no_grad():
            mine = ours(policy, ids)
        router.say_if_without(policy, notes.append)
        if family in SILENT:
            (note,) = about_routers(notes)
            assert "asks for 0.5 times its router's" in note
            assert note.endswith(f"trains without it: transformers computes none for {type(model).__name__}.")
            return
        with torch.no_grad():
            own = model(input_ids=ids, labels=ids)
    assert notes == []
    assert float(mine.loss) == pytest.approx(float(own.loss), abs=1e-4)
    assert (own.aux_loss is None) == (router.METRIC not in mine.metrics)


@pytest.mark.parametrize("options", [{"output_router_logits": False}, {"router_aux_loss_coef": 0.0}])
def test_nothing_is_added_unasked(tmp_path: Path, options: dict[str, Any]) -> None:
    model = mixture(tmp_path / "model", **options)
    (row, *_), notes = run(
        sft.sft, sft.SFTConfig, tmp_path, model=model, data=demonstrations(tmp_path, 2), batch_size=2
    )
    assert "aux_loss" not in row
    assert about_routers(notes) == []


def test_preferences_are_learnt_with_it(tmp_path: Path) -> None:
    """A pair at the reference costs log 2, and its router what transformers says of the tokens of both replies."""
    data = write(tmp_path / "p.jsonl", ({"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS))
    options = {"data": data, "eval_data": data, "batch_size": len(PAIRS), "lr": 1e-9}
    (row, *_), notes = run(dpo.dpo, dpo.DPOConfig, tmp_path, model=mixture(tmp_path / "model"), **options)
    assert row["aux_loss"] > 1
    assert row["loss"] == pytest.approx(0.6931 + FACTOR * row["aux_loss"], abs=1e-3)
    assert about_routers(notes) == []
    assert "held out loss" in notes[-1]
    assert "aux" not in notes[-1]  # held-out numbers are about preferences alone


@pytest.mark.parametrize("stage", ["grpo", "reward"])
def test_other_stages_say_that_they_leave_it_out(tmp_path: Path, stage: str) -> None:
    model = mixture(tmp_path / "model")
    if stage == "grpo":
        data = write(tmp_path / "p.jsonl", ({"prompt": p} for p, *_ in PAIRS))
        options = {"reward": f"{share_of_a.__module__}:share_of_a", "num_generations": 2, "max_new_tokens": 4}
        rows, notes = run(rl_stage.grpo, grpo.GRPOConfig, tmp_path, model=model, data=data, batch_size=2, **options)
    else:
        data = write(tmp_path / "p.jsonl", ({"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS))
        options = {"batch_size": 2, "calibration": 0}
        rows, notes = run(
            reward_model.reward_model, reward_model.RewardConfig, tmp_path, model=model, data=data, **options
        )
    assert "aux_loss" not in rows[0]
    (said,) = about_routers(notes)
    assert said.endswith("this stage trains without it: sft and the preference stages add it.")
