"""Against TRL's own trainers: the same losses, gradients, weights and logs in three steps, and less memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("tokenizers")

import trl_worlds as world
from accelerate.state import AcceleratorState
from page import shown
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOTrainer, GRPOTrainer

from rlhf_kernels.integrations.trl import FusedDPOTrainer, FusedGRPOTrainer
from rlhf_kernels.integrations.versions import require

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers', not ours

WORDS = 2048
TOLERANCE = 100 * torch.finfo(torch.float32).eps  # 1.2e-5
TIMES = ("time", "runtime", "per_second", "step_time", "flos")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    return world.policy(tmp_path_factory.mktemp("policy"), WORDS)


@pytest.fixture(autouse=True)
def _no_precision_of_an_earlier_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


class Run(NamedTuple):
    trainer: Any
    grads: list[dict[str, torch.Tensor]]  # as they reach the optimizer, step by step
    gained: dict[str, torch.Tensor]  # weights after the last step less those before the first
    rounding: dict[str, float]  # largest rounding error of the same in two runs


def trained(kind: type, saved: str, args: Any, **more: Any) -> Run:
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    watch = world.Watch()
    common = {"model": model, "args": args, "processing_class": AutoTokenizer.from_pretrained(saved)}
    if issubclass(kind, GRPOTrainer):
        common |= {"reward_funcs": world.reward, "train_dataset": world.prompts(WORDS)}
    else:
        common |= {"train_dataset": world.pairs(WORDS)}
    trainer = kind(**common, callbacks=[watch], **more)
    trainer.train()
    gained = {name: p.detach() - before[name] for name, p in model.named_parameters() if name in before}
    rounding = {name: args.max_steps * torch.finfo(torch.float32).eps * float(x.norm()) for name, x in before.items()}
    return Run(trainer, watch.grads, gained, rounding)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float, **rounding: Any) -> None:
    """Relative L2 distance of every tensor; ``rounding`` is what a tensor owes to being a difference of others."""
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert x.norm() > 0, name
        assert (ours[name] - x).norm() <= tolerance * x.norm() + rounding.get("of", {}).get(name, 0.0), name


def same_logs(ours: list[dict[str, float]], theirs: list[dict[str, float]], tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            if not any(word in name for word in TIMES):
                assert mine[name] == pytest.approx(value, rel=tolerance, abs=tolerance, nan_ok=True), name


def compare(ours: type, theirs: type, saved: str, config: Any) -> list[dict[str, float]]:
    a, b = trained(ours, saved, config()), trained(theirs, saved, config())
    assert len(a.grads) == len(b.grads) == 3
    for mine, other in zip(a.grads, b.grads, strict=True):
        same(mine, other, TOLERANCE)
    same(a.gained, b.gained, TOLERANCE, of=a.rounding)
    same_logs(a.trainer.state.log_history, b.trainer.state.log_history, TOLERANCE)
    return a.trainer.state.log_history


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "grpo", "temperature": 0.7, "importance_sampling_level": "sequence", "epsilon": 1e-4},
        {"loss_type": "cispo", "entropy_coef": 0.02, "beta": 0.0, "gradient_accumulation_steps": 2},
        {"loss_type": "dr_grpo", "top_entropy_quantile": 0.5, "temperature": 1.3, "epsilon": 1e-3},
    ],
    ids=["dapo", "gspo", "cispo", "dr_grpo"],
)
def test_grpo_is_trls(saved: str, tmp_path: Path, options: dict[str, Any]) -> None:
    logs = compare(FusedGRPOTrainer, GRPOTrainer, saved, lambda: world.grpo_config(tmp_path, **options))
    assert {"loss", "entropy", "reward", "rewards/reward/mean"} <= logs[0].keys()
    assert ("kl" in logs[0]) == (options.get("beta") != 0.0)
    if "epsilon" in options:
        assert any(step.get("clip_ratio/region_mean", 0) > 0 for step in logs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 1.0], "gradient_accumulation_steps": 2},
        {"loss_type": "ipo", "beta": 0.3},
        {"loss_type": "robust", "label_smoothing": 0.1, "ld_alpha": 0.5},
    ],
    ids=["sigmoid", "with sft", "ipo", "robust"],
)
def test_dpo_is_trls(saved: str, tmp_path: Path, options: dict[str, Any]) -> None:
    logs = compare(FusedDPOTrainer, DPOTrainer, saved, lambda: world.dpo_config(tmp_path, **options))
    wanted = {"loss", "entropy", "logps/chosen", "logits/chosen", "mean_token_accuracy"}
    assert wanted | {"rewards/chosen", "rewards/margins", "rewards/accuracies"} <= logs[0].keys()


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_an_adapter_trains_as_with_trl(kind: str, saved: str, tmp_path: Path) -> None:
    """One backbone under LoRA: the reference is the same model with the adapter off."""
    peft = pytest.importorskip("peft")
    of = {"dpo": (FusedDPOTrainer, DPOTrainer), "grpo": (FusedGRPOTrainer, GRPOTrainer)}[kind]
    config = {"dpo": world.dpo_config, "grpo": world.grpo_config}[kind]
    runs = []
    for trainer in of:
        adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        runs.append(trained(trainer, saved, config(tmp_path, learning_rate=1.0), peft_config=adapter))
    a, b = runs
    for mine, other in list(zip(a.grads, b.grads, strict=True))[1:]:  # in the first step half of them are zero
        same(mine, other, TOLERANCE)
    same_logs(a.trainer.state.log_history, b.trainer.state.log_history, TOLERANCE)
    assert a.trainer.state.log_history[2]["rewards/margins" if kind == "dpo" else "kl"] != 0


def test_a_routers_loss_is_refused_and_its_model_is_not(tmp_path: Path) -> None:
    folder = world.routed(tmp_path, WORDS)
    with pytest.raises(ValueError, match=r"^router_aux_loss_coef: got 0.01"):
        trained(FusedDPOTrainer, folder, world.dpo_config(tmp_path, router_aux_loss_coef=0.01))
    compare(FusedDPOTrainer, DPOTrainer, folder, lambda: world.dpo_config(tmp_path, router_aux_loss_coef=0.0))


def test_policy_and_reference_share_a_precision(saved: str, tmp_path: Path) -> None:
    """In mixed precision both run under autocast: equal weights have equal rewards, to the bit."""
    logs = []
    for bf16 in (False, True):
        run = trained(FusedDPOTrainer, saved, world.dpo_config(tmp_path, bf16=bf16, max_steps=1))
        assert run.trainer.accelerator.mixed_precision == ("bf16" if bf16 else "no")
        logs.append(run.trainer.state.log_history[0])
        assert not torch.is_autocast_enabled("cpu")
        AcceleratorState._reset_state()
    assert logs[1]["rewards/chosen"] == logs[1]["rewards/rejected"] == 0.0
    a, b = (log["logps/chosen"] for log in logs)
    assert a != b
    assert a == pytest.approx(b, rel=torch.finfo(torch.bfloat16).eps)


def test_evaluation_is_trls(saved: str, tmp_path: Path) -> None:
    logs = []
    for kind in (FusedDPOTrainer, DPOTrainer):
        config = world.dpo_config(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1)
        logs.append(trained(kind, saved, config, eval_dataset=world.pairs(WORDS)).trainer.state.log_history)
    same_logs(*logs, TOLERANCE)
    assert any("eval_rewards/margins" in step for step in logs[0])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("use_weighting", {"use_weighting": True}),
        ("use_liger_kernel", {"use_liger_kernel": True}),
        ("fsdp", {"fsdp": "full_shard"}),
    ],
)
def test_an_option_that_is_not_served_is_refused_by_name(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    config = world.dpo_config(tmp_path)
    for key, value in options.items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=f"^{name}: got .*FusedDPOTrainer"):
        FusedDPOTrainer("no/such/model", args=config)  # which nobody has tried to load yet


def test_a_head_that_is_not_linear_is_refused(saved: str, tmp_path: Path) -> None:
    class Odd(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).abs()

    model = AutoModelForCausalLM.from_pretrained(saved)
    model.lm_head.__class__ = Odd
    with pytest.raises(ValueError, match=r"^model: LlamaForCausalLM .*Odd"):
        FusedDPOTrainer(
            model,
            args=world.dpo_config(tmp_path),
            train_dataset=world.pairs(WORDS),
            processing_class=AutoTokenizer.from_pretrained(saved),
        )


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_what_follows_the_head_is_kept(family: str, tmp_path: Path) -> None:
    """A softcap of logits, and a scale."""
    folder = world.capped(tmp_path, WORDS) if family == "gemma2" else world.scaled(tmp_path, WORDS)
    compare(FusedDPOTrainer, DPOTrainer, folder, lambda: world.dpo_config(tmp_path))


def test_what_the_page_shows_runs(saved: str, tmp_path: Path) -> None:
    names = {
        "model": AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32),
        "config": world.dpo_config(tmp_path, max_steps=1),
        "pairs": world.pairs(WORDS),
        "tokenizer": AutoTokenizer.from_pretrained(saved),
    }
    exec(shown("Coming from TRL"), names)
    assert names["trainer"].state.global_step == 1


@pytest.mark.parametrize(("low", "high"), [("99", "100"), ("1.0", "1.1")])
def test_another_version_is_refused(low: str, high: str) -> None:
    with pytest.raises(ImportError, match=f"^trl: got version .*, wants >={low},<{high}"):
        require("trl", low, high)
    with pytest.raises(ImportError, match=r"^no-such-package: got none installed"):
        require("no-such-package", low, high)


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no high-water mark of memory to reset")
@pytest.mark.parametrize("kind", ["grpo", "dpo"])
def test_less_memory_than_trls(kind: str, tmp_path: Path) -> None:
    """A step of a few hundred tokens at a vocabulary of 32768: TRL's head holds several tiles of all of them."""
    folder, script = world.policy(tmp_path, 32768, layers=1), Path(__file__).with_name("trl_memory.py")
    found = {}
    for whose in ("ours", "theirs"):
        command = [sys.executable, str(script), kind, whose, folder]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
        _, peak, loss = next(line for line in said.splitlines() if line.startswith("peak ")).split()
        found[whose] = float(peak), float(loss)
    assert found["ours"][0] < found["theirs"][0] / 2, found
    assert found["ours"][1] == pytest.approx(found["theirs"][1], rel=TOLERANCE, abs=TOLERANCE)
