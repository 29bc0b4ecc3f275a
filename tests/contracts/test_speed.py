"""What makes trainers large, slow or hard to install, each named after its number in the design."""

from __future__ import annotations

import dataclasses
import importlib
import os
import random
import subprocess
import sys
import time
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

import rlhf_kernels as rk
from benchmarks.measure.memory import Allocations
from rlhf_kernels.engine import call
from tests.support.small import write
from trainer.cli import program as cli
from trainer.models import loading
from trainer.models import policy as policies
from trainer.models.tiny import tiny_policy, word_tokenizer
from trainer.stages import sft

ROOT = Path(__file__).parents[2]
VOCABULARY, HIDDEN, SHORT, LONG = 4096, 32, 12, 16  # words of a prompt, and of a response
WORDS = [f"w{i}" for i in range(VOCABULARY - 2)]
FEWEST = 100  # tokens in the smallest micro-batch of any stage below
OF_A_CHECK = 8  # tokens that loading a model tries it on

STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {"eval_data": "shown.jsonl", "label_smoothing": 0.1, "z_loss": 1e-3}),
    "reward": ("reward", {"eval_data": "pairs.jsonl", "calibration": 10, "calibration_new_tokens": LONG}),
    "ppo": ("ppo", {"tax_data": "shown.jsonl", "eval_every": 1}),
    "ppo, shared": ("ppo", {"value_model": "shared", "entropy_coef": 0.01}),
    "ppo, ptx": ("ppo", {"ptx_coef": 0.1, "ptx_data": "shown.jsonl", "kl_in": "loss", "importance_cap": 2.0}),
    "ppo, generate": ("ppo", {"sampler": "generate", "gold_reward": "reward"}),
    "grpo": ("grpo", {"num_generations": 2, "batch_size": 5}),
    "grpo, gspo": ("grpo", {"num_generations": 2, "batch_size": 5, "ratio": "sequence"}),
    "dpo": ("dpo", {"eval_data": "pairs.jsonl"}),
    "dpo, scored at every step": ("dpo", {"reference_once": False}),
    "ipo": ("ipo", {}),
    "kto": ("kto", {"data": "labelled.jsonl"}),
    "orpo": ("orpo", {}),
    "simpo": ("simpo", {"sft_coef": 0.1}),
    "eval": ("eval", {"data": "prompts.jsonl", "lm_data": "shown.jsonl", "tasks": ("tasks.jsonl",)}),
}
OF_RL = {"steps": 2, "batch_size": 10, "max_new_tokens": LONG, "reward": "reward", "data": "prompts.jsonl"}
OF_EVAL = {"model": "model", "base": "model", "judge": "reward", "max_new_tokens": LONG}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose vocabulary is its largest part, and ten records of every kind."""
    path = tmp_path_factory.mktemp("speed")
    policy = tiny_policy(word_tokenizer(WORDS), 0, hidden=HIDDEN, layers=1)
    policy.save(path / "model")
    loading.scalar_from(policy).save(path / "reward")
    source = random.Random(0)

    def words(count: int) -> str:
        return " ".join(source.sample(WORDS, count))

    def records(name: str, *fields: str) -> None:
        write(path / name, ({f: words(SHORT if f == "prompt" else LONG) for f in fields} for _ in range(10)))

    records("shown.jsonl", "prompt", "response")
    records("pairs.jsonl", "prompt", "chosen", "rejected")
    records("prompts.jsonl", "prompt")
    records("tasks.jsonl", "prompt", "answer")
    write(
        path / "labelled.jsonl",
        ({"prompt": words(SHORT), "response": words(LONG), "label": i % 2 == 0} for i in range(10)),
    )
    return path


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the logits of sixteen rows; what csrc or an operator needs inside is within the budget, too."""
    monkeypatch.setitem(call.MAX_BYTES, "cpu", 16 * 4 * VOCABULARY)


def config_of(stage: str, folder: Path, out: Path) -> tuple[Any, Any]:
    """A stage's function and its configuration for two steps over everything there is."""
    name, options = STAGES[stage]
    found = cli.STAGES[name]
    module = importlib.import_module(found.module)
    common: dict[str, Any] = {"model": "model", "data": "pairs.jsonl", "batch_size": 10, "steps": 2}
    common = OF_EVAL if name == "eval" else common | (OF_RL if name in ("ppo", "grpo") else {})
    if name == "sft":
        common["data"] = "shown.jsonl"

    def placed(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(placed, x))
        there = isinstance(x, str) and (folder / x).exists()
        return (str if x in ("model", "reward") else Path)(folder / x) if there else x

    given = {key: placed(x) for key, x in (common | options).items()}
    return getattr(module, found.run), getattr(module, found.config)(**given, out=out, quiet=True)


def test_pitfall_22_every_stage_is_looked_at() -> None:
    """Every one that is given a model; the demo and pipelines are made of these."""
    configs = {name: getattr(importlib.import_module(x.module), x.config) for name, x in cli.STAGES.items()}
    given_one = {name for name, config in configs.items() if "model" in {f.name for f in dataclasses.fields(config)}}
    assert {name for name, _ in STAGES.values()} == given_one


@pytest.mark.usefixtures("small_budget")
@pytest.mark.parametrize("stage", STAGES)
def test_pitfall_22_no_tensor_of_tokens_by_vocabulary(
    stage: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading, sampling, scoring, training, evaluation: nothing is larger than the head's weight."""
    tokens, inputs = [], policies._inputs

    def counted(packed: Any) -> Any:
        tokens.append(len(packed.input_ids))
        return inputs(packed)

    monkeypatch.setattr(policies, "_inputs", counted)
    run, config = config_of(stage, folder, tmp_path / "out")
    with Allocations() as seen:
        run(config)
    rows = seen.largest / VOCABULARY
    assert seen.largest <= HIDDEN * VOCABULARY, f"{seen.largest_from} made a tensor of {rows:.0f} rows of logits"
    assert seen.largest == HIDDEN * VOCABULARY  # the weight itself was seen, so the hook looks at the right place
    assert min(n for n in tokens if n > OF_A_CHECK) >= FEWEST > 2 * HIDDEN


@pytest.mark.usefixtures("small_budget")
def test_pitfall_22_the_hook_sees_logits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens: list[int] = []

    def materialised(cfg: Any, policy: Any, batch: Any, num_tokens: int) -> rk.LossOutput:
        tokens.append(len(batch.targets))
        logits = policy.logits(policy.hidden(batch))
        loss = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum") / num_tokens
        return rk.LossOutput(loss, {})

    monkeypatch.setattr(sft, "loss", materialised)
    run, config = config_of("sft", folder, tmp_path / "out")
    with Allocations() as seen:
        run(config)
    assert seen.largest == max(tokens) * VOCABULARY
    assert min(tokens) >= FEWEST


WITHOUT = """
import importlib.util, pkgutil, sys
from importlib.machinery import PathFinder

HIDDEN = {"triton", "rich", "tensorboard", "tensorboardX", "flash_attn", "pyarrow", "accelerate", "peft", "datasets"}


class Hides(PathFinder):
    # In place of the finder of installed packages: what it hides is not there, for nobody who asks.
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, context):
        return () if context.name in HIDDEN else super().find_distributions(context)


sys.meta_path = [Hides if finder is PathFinder else finder for finder in sys.meta_path]
assert not any(importlib.util.find_spec(name) for name in HIDDEN)
import torch
import rlhf_kernels as rk
import trainer

assert not torch.cuda.is_available()
assert "No module named 'triton'" in rk.backends()["triton"], rk.backends()
modules = [m.name for m in pkgutil.walk_packages(trainer.__path__, "trainer.") if m.name != "trainer.__main__"]
for name in modules:
    importlib.import_module(name)
assert len(modules) > 50, modules
h, w, y = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4), torch.arange(3)
rk.ppo_loss(h, w, y, None, torch.ones(3)).loss.backward()
assert not HIDDEN & {m.partition(".")[0] for m in sys.modules}
from trainer import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def test_pitfall_26_nothing_optional_is_needed(folder: Path, tmp_path: Path) -> None:
    """Without triton, a GPU, rich, tensorboard, accelerate everything is imported, and a stage trains and reports."""
    flags = [
        "sft", "--model", str(folder / "model"), "--data", str(folder / "shown.jsonl"), "--out", str(tmp_path / "run"),
        "--steps", "1", "--batch-size", "4", "--threads", "1",
    ]  # fmt: skip
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITHOUT, *flags]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "report.html").exists()


def test_pitfall_26_the_oldest_transformers_is_the_tested_one() -> None:
    """One environment has one transformers. CI has what constraints.txt pins: the oldest that pyproject.toml admits.

    The newest is tested by running the suite where it is installed; all that is asked of it here is to be admitted.
    """
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    (admitted,) = (r.specifier for r in map(Requirement, wanted) if r.name == "transformers")
    oldest = next(Version(x.version) for x in admitted if x.operator == ">=")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    (pinned,) = (Version(line.partition("==")[2]) for line in lines if line.startswith("transformers=="))
    assert pinned.release[:2] == oldest.release[:2]
    assert version("transformers") in admitted


BUSY = "while True: pass"
DEMO = {
    "sft_steps": 60, "ranked_prompts": 150, "reward_steps": 15, "weak_reward_steps": 1, "ppo_steps": 4, "hack_steps": 0,
    "test_prompts": 64,
}  # fmt: skip


@pytest.mark.slow
def test_pitfall_28_the_demo_beside_two_busy_processes(tmp_path: Path) -> None:
    """All on the same two cores: a fair share of them is two thirds of one, so 1.5 times the idle time."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    env = {k: v for k, v in os.environ.items() if "OMP" not in k} | {"PYTHONPATH": str(ROOT)}
    options = [x for name, value in DEMO.items() for x in (f"--{name.replace('_', '-')}", str(value))]

    def pinned(*command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        os.sched_setaffinity(process.pid, cores)
        return process

    def seconds(turn: int, busy: int) -> float:
        neighbours = [pinned("-c", BUSY) for _ in range(busy)]
        try:
            start = time.perf_counter()
            demo = pinned("-m", "trainer", "demo", "--out", str(tmp_path / f"{turn}-{busy}"), *options, "--quiet")
            output = demo.communicate(timeout=600)[0]
            assert demo.returncode == 0, output
            return time.perf_counter() - start
        finally:
            for neighbour in neighbours:
                neighbour.kill()
                neighbour.communicate()

    turns = [(seconds(turn, 0), seconds(turn, 2)) for turn in range(2)]
    idle, loaded = (min(column) for column in zip(*turns, strict=True))
    assert loaded < 3 * idle, f"{loaded:.1f} s beside two busy processes, {idle:.1f} s alone"
