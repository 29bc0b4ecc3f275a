"""Everything about a recipe's stages that can be wrong before the first of them has begun."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.base.paths import model_folder
from trainer.cli.recipe import Recipe, Work
from trainer.data.hashing import sha256
from trainer.evaluation import stage as evaluation
from trainer.evaluation.stage import EvalConfig
from trainer.rewards.fields import read_prompts, wanted
from trainer.rewards.names import check_source, sources_of
from trainer.run import sinks
from trainer.stages import split
from trainer.stages.preference import loop as preference
from trainer.stages.preference.loop import PreferenceConfig
from trainer.stages.rl.grpo import GRPO, GRPOConfig
from trainer.stages.rl.options import RLConfig, check_rl
from trainer.stages.rl.ppo import PPO, PPOConfig
from trainer.stages.split import SplitConfig
from trainer.training import options as stage_options
from trainer.training.defaults import decided
from trainer.training.options import StageConfig

NO_MODEL = ("eval", "inspect", "split")
MODELS = ("model", "base", "reference", "value_model", "tokenizer")
LOCAL = ("/", "./", "../", "~")


def check_work(recipe: Recipe, work: Sequence[Work], *, load: bool) -> dict[str, str]:
    """Looks at every option, file and name.

    Args:
        recipe: Named in messages.
        work: Its stages with their configs.
        load: Import the modules of reward functions too, which are about to be used; otherwise they are only read.

    Returns:
        The sha256 of every data file that is there before the first stage, by `stage.option`.

    Raises:
        FileNotFoundError: A data file does not exist.
        ValueError: Anything else that would stop a stage; names it, the option, what it got and what it wants.
    """
    inputs: dict[str, str] = {}
    earlier: dict[str, Work] = {}
    for w in work:
        try:
            inputs |= {f"{w.name}.{option}": sha256(path) for option, path in _files(w.config, earlier)}
            _models(w.config, earlier)
            _values(decided(w.config))
            _sources(w.config, earlier, load=load)
            _wanted_fields(w.config, earlier, load=load)
        except (ValueError, FileNotFoundError) as error:
            hint = "" if not isinstance(error, FileNotFoundError) else _variables(recipe)
            raise type(error)(f"{recipe.source}: {w.name}: {error}{hint}") from error
        earlier[str(w.config.out)] = w
    return inputs


def _variables(recipe: Recipe) -> str:
    shown = ", ".join(f"{name}={value}" for name, value in recipe.variables.items())
    return f"; the variables are {shown} (--set NAME=VALUE changes one)" if shown else ""


def _files(config: Any, earlier: Mapping[str, Work]) -> Iterator[tuple[str, Path]]:
    """Options that name files, but for those that an earlier stage will write."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for path in value if isinstance(value, tuple) else (value,):
            if not isinstance(path, Path) or field.name == "out":
                continue
            maker = _maker(path, earlier)
            if maker is None:
                yield field.name + (f" ({path})" if isinstance(value, tuple) else ""), path
            elif path == maker.config.out:
                raise ValueError(f"{field.name}: ${{{maker.name}}} is a folder, want a file in it")
            elif maker.stage == "split" and path.name not in (split.TRAIN, split.HELD_OUT):
                raise ValueError(
                    f"{field.name}: got {path.name}, want {split.TRAIN} or {split.HELD_OUT} of {maker.name}"
                )


def _maker(path: Path, earlier: Mapping[str, Work]) -> Work | None:
    """The earlier stage that will write a file."""
    return next((w for folder, w in earlier.items() if Path(folder) in (path, *path.parents)), None)


def _models(config: Any, earlier: Mapping[str, Work]) -> None:
    """Options that name models: what an earlier stage leaves, a folder that is there, or a name on the hub."""
    for option in MODELS:
        value = getattr(config, option, None)
        if not isinstance(value, str):
            continue
        if (maker := earlier.get(value)) is not None and maker.stage in NO_MODEL:
            raise ValueError(f"{option}: {maker.name} leaves no model, want a stage that trains one")
        known = value in earlier or any(value.startswith(folder + "/") for folder in earlier)
        if not known and value.startswith(LOCAL) and model_folder(value) is None:
            raise ValueError(f"{option}: {value} is not the folder of a model, nor of a run that left one")


def _values(config: Any) -> None:
    """What the stage itself would refuse."""
    if isinstance(config, StageConfig):
        stage_options.check_options(config)
        sinks.check(config.log_to)
    if isinstance(config, PreferenceConfig):
        preference.check_preference(config)
    if isinstance(config, RLConfig):
        check_rl(config)
    if isinstance(config, PPOConfig):
        PPO(config)
    if isinstance(config, GRPOConfig):
        GRPO(config)
    if isinstance(config, SplitConfig):
        split.check_split(config)
    if isinstance(config, EvalConfig):
        evaluation.check_eval(config)


def _sources(config: Any, earlier: Mapping[str, Work], *, load: bool) -> None:
    """Rewards and judges."""
    for option, name in sources_of(config):
        maker = earlier.get(name)
        if maker is not None and maker.stage != "reward":
            raise ValueError(f"{option}: {maker.name} leaves no reward model, want a stage reward")
        if maker is None:
            check_source(name, option, load=load)


def _wanted_fields(config: Any, earlier: Mapping[str, Work], *, load: bool) -> None:
    """What rewards and judges want to find in the records, where the data is there already."""
    if not isinstance(config, RLConfig | EvalConfig) or config.data is None or _maker(config.data, earlier):
        return
    sources = [(option, name) for option, name in sources_of(config) if name not in earlier]
    if any(wanted(name, option, load=load) for option, name in sources):
        most = config.prompts if isinstance(config, EvalConfig) else None
        read_prompts(config.data, sources, note=lambda _: None, most=most, load=load)
