"""Options of TRL, transformers, OpenRLHF and verl: one line says what each of them is called here."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro")

from trainer.base.subcommands import STAGES
from trainer.cli import foreign_options
from trainer.cli import program as cli

DOCS = Path(__file__).parents[3] / "docs" / "trainer.md"
NAMES = [name for names, _ in foreign_options.TABLE for name in names.split()]


def options(stage: str) -> set[str]:
    config = getattr(importlib.import_module(STAGES[stage].module), STAGES[stage].config)
    return {field.name for field in dataclasses.fields(config)}


def told(stage: str, name: str) -> str:
    return foreign_options.answer(name, options(stage)) or ""


@pytest.mark.parametrize("stage", STAGES)
def test_an_answer_names_only_options_that_the_stage_has(stage: str) -> None:
    for name in [*NAMES, *foreign_options.DOTTED]:
        said = told(stage, name.replace("*", "x"))
        assert said, name
        for option in re.findall(r"--([\w-]+)", said):
            assert option.replace("-", "_") in options(stage) | {"overwrite"}, f"{name}: {said}"


def test_no_name_and_no_answer_stands_there_in_vain() -> None:
    stages = {stage: options(stage) for stage in STAGES}
    assert len(NAMES) == len(set(NAMES))
    for names, answers in foreign_options.TABLE:
        for name in names.split():
            assert any(name not in known for known in stages.values()), f"{name} is an option of every stage"
            given = {foreign_options.answer(name.replace("*", "x"), k) for k in stages.values() if name not in k}
            assert given <= {*answers, foreign_options.NOTHING}, f"{name} is answered by an earlier line"
        given = {foreign_options.answer(names.split()[0].replace("*", "x"), known) for known in stages.values()}
        assert set(answers) <= given, f"{names}: nobody is told {set(answers) - given}"


@pytest.mark.parametrize(
    ("stage", "name", "said"),
    [
        ("grpo", "--learning-rate", "want --lr"),
        ("ppo", "--actor_learning_rate", "want --lr"),
        ("ppo", "--critic_learning_rate", "want --value-lr"),
        ("grpo", "--critic_learning_rate", "no value model"),
        ("sft", "--num-train-epochs", "--steps, a number of steps of --batch-size records"),
        ("grpo", "--num-train-epochs", "--steps, a number of rollouts of --batch-size prompts"),
        ("ppo", "--max_epochs", "want --epochs"),
        ("grpo", "--num-iterations", "want --epochs"),
        ("ppo", "--num-ppo-epochs", "want --epochs"),
        ("dpo", "--max-steps", "want --steps"),
        ("dpo", "--per-device-train-batch-size", "want --batch-size"),
        ("grpo", "--per-device-train-batch-size", "want --batch-size, the prompts of a rollout"),
        ("dpo", "--micro_train_batch_size", "want --max-tokens"),
        ("sft", "--gradient-accumulation-steps", "not needed: --batch-size is the whole step"),
        ("sft", "--bf16", "want --precision bfloat16"),
        ("sft", "--use-peft", "not here"),
        ("sft", "--lora_rank", "not here"),
        ("sft", "--report-to", "report.html"),
        ("sft", "--push-to-hub", "hf upload"),
        ("eval", "--output-dir", "want --out"),
        ("reward", "--model-name-or-path", "want --model"),
        ("grpo", "--prompt_data", "want --data"),
        ("dpo", "--max-prompt-length", "want --max-length"),
        ("grpo", "--max-completion-length", "want --max-new-tokens"),
        ("dpo", "--max-completion-length", "want --max-length"),
        ("grpo", "--beta", "want --kl-coef"),
        ("ppo", "--init_kl_coef", "want --kl-coef"),
        ("grpo", "--epsilon", "want --clip"),
        ("ppo", "--vf-coef", "want --value-coef"),
        ("grpo", "--n_samples_per_prompt", "want --num-generations"),
        ("ppo", "--num-generations", "stage grpo"),
        ("sft", "--warmup-ratio", "want --warmup-steps"),
        ("sft", "--lr-scheduler-type", "want --schedule"),
        ("sft", "--max_norm", "want --max-grad-norm"),
        ("sft", "--eval-strategy", "want --eval-data"),
        ("grpo", "--eval-steps", "want --eval-every"),
        ("sft", "--save-steps", "want --save-every"),
        ("sft", "--resume-from-checkpoint", "rlhf-train resume RUN"),
        ("grpo", "--vllm_mode", "--sampler"),
        ("grpo", "--loss-type", "--reduction"),
        ("dpo", "--loss-type", "want --loss"),
        ("ppo", "--missing-eos-penalty", "want --truncation-score"),
        ("ppo", "--reward-model-path", "want --reward"),
        ("eval", "--reward_pretrain", "want --judge"),
        ("dpo", "--ref_model", "want --reference"),
        ("grpo", "--ref_model", "--model"),
        ("split", "--test-size", "want --held-out"),
        ("sft", "--beta", "nothing like it"),
        ("grpo", "actor_rollout_ref.rollout.n", "want --num-generations"),
        ("grpo", "actor_rollout_ref.actor.optim.lr", "want --lr"),
        ("ppo", "critic.optim.lr", "want --value-lr"),
        ("ppo", "--train.max_epochs", "want --epochs"),
        ("ppo", "--reward.model_name_or_path", "want --reward"),
        ("sft", "--eval.dataset", "want --eval-data"),
        ("sft", "--adam.eps", "want --adam-eps"),
        ("sft", "--ds.lora.rank", "not here"),
        ("dpo", "--kl-coef", "want --beta"),
    ],
)
def test_what_it_is_called_here(stage: str, name: str, said: str) -> None:
    assert name.lstrip("-").replace("-", "_") not in options(stage)
    assert said in told(stage, name)


def test_one_line_and_nothing_done(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    argv = ["grpo", "--data", "none.jsonl", "--out", str(out), "--reward", "exact_answer"]
    argv += ["--learning-rate", "1e-5", "--beta=0.1", "--batchsize", "3", "--nothing-like", "data.train_files=a.jsonl"]
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    assert said == (
        "rlhf-train: grpo: unknown option '--learning-rate'; want --lr. Unknown option '--beta'; want --kl-coef. "
        "Unknown option '--batchsize'; did you mean '--batch-size'? Unknown option '--nothing-like'; see rlhf-train "
        "grpo --help. Unknown option 'data.train_files'; want --data, a file in jsonl, jsonl.gz or parquet\n"
    )
    assert not out.exists()


def test_options_of_the_stage_are_left_alone(tmp_path: Path, capsys: Any) -> None:
    """In every spelling; what is wrong with the data comes next."""
    argv = ["dpo", "--data", str(tmp_path / "no.jsonl"), "--beta", "0.2", "--no-length-normalize", "--max_tokens=64"]
    assert cli.main([*argv, "--out", str(tmp_path / "run"), "--reference-once"]) == 2
    assert "no.jsonl does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["dpo", "--learning-rate", "1", "--help"])
    assert stop.value.code == 0
    rest = ["--thresholds", "kl_per_seq=30", "--reward", "a.b=rules:brief@0.2", "--clip", "-1", "--"]
    assert foreign_options.typed(rest) == ["--thresholds", "--reward", "--clip"]


def test_files_get_the_same_answer(tmp_path: Path, capsys: Any) -> None:
    config, recipe = tmp_path / "c.yaml", tmp_path / "r.yaml"
    config.write_text("learning-rate: 1e-5\nper_device_train_batch_size: 4\n")
    assert cli.main(["sft", "--config", str(config)]) == 2
    said = capsys.readouterr().err
    assert "unknown option 'learning_rate'; want lr. Unknown option 'per_device_train_batch_size'; want bat" in said
    recipe.write_text("stages:\n  sft:\n    data: d.jsonl\n    learning_rate: 1e-5\n    stepz: 2\n")
    assert cli.main(["pipeline", str(recipe), "--check"]) == 2
    said = capsys.readouterr().err
    assert "r.yaml: sft: unknown option 'learning_rate'; want lr. Unknown option 'stepz'; did you mean 'steps'?" in said
    assert said.count("\n") == 1


def test_the_table_of_the_documents_is_true() -> None:
    section = DOCS.read_text(encoding="utf-8").partition("## Options of other programs")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    assert len(rows) > 15
    for left, right in rows:
        # `--a`; `--b` beside `--c`; `--d`: two rows in one
        parts = left.count(";") == right.count(";")
        for theirs, ours in zip(left.split(";"), right.split(";"), strict=True) if parts else [(left, right)]:
            for name in re.findall(r"`--([\w-]+)`", theirs):
                stages = [stage for stage in STAGES if name.replace("-", "_") not in options(stage)]
                answers = " ".join(told(stage, name) for stage in stages)
                assert set(answers.split()) - set(foreign_options.NOTHING.split()), name
                for option in re.findall(r"`(--[a-z-]+)`", ours):
                    assert option in answers, f"{name}: {answers}"
