"""Models by name: a run folder, a local directory or a hub id; each is tried before anybody trains it."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trainer.base.paths import resolve
from trainer.models import files as model_files
from trainer.models import trial
from trainer.models.policy import Policy, ScalarModel, scalar_from


def load_policy(path: str) -> Policy:
    """A local directory or hub id. Weights in float32; the code of a model is never run.

    Raises:
        ValueError: If the model is not whole (``model_files.load``) or cannot be taken apart into hidden states and a
            linear head, the tokenizer has no end of sequence, or packed sequences do not give the logits that they
            give alone.
    """
    path = resolve(path)
    model, tokenizer = model_files.load(AutoModelForCausalLM, path), model_files.tokenizer_of(path)
    trial.check_end(model, tokenizer, path)
    with trial.tried(model, path):
        policy = Policy(model, tokenizer)
        trial.check_policy(policy)
    if not {*policy.ends} <= {tokenizer.eos_token_id, *_listed(model.generation_config.eos_token_id)}:
        # The template ends turns with a token that the model suggests to nobody; who loads what we save is told of it.
        model.generation_config.eos_token_id = policy.ends
    return policy


def load_scalar(path: str, generator: torch.Generator | None = None) -> ScalarModel:
    """A saved reward or value model, or a new one on the backbone of a causal language model at ``path``.

    Args:
        path: A local directory or hub id.
        generator: Draws the head of a new one; None is for who wants a model that has learnt to judge.

    Raises:
        ValueError: If it has no head of one number and ``generator`` is None, packed sequences are not kept apart, or
            what ``load_policy`` raises.
    """
    path = resolve(path)
    kinds = model_files.config_of(path).architectures or []
    if not any("SequenceClassification" in kind for kind in kinds):
        if generator is None:
            raise ValueError(
                f"model: {path} is {kinds[0] if kinds else 'a model of no known kind'} and has no head that scores, "
                "want a reward model; `rlhf-train reward` makes one of it"
            )
        return scalar_from(load_policy(path), generator)
    model = model_files.load(AutoModelForSequenceClassification, path)
    scalar = ScalarModel(model, model_files.tokenizer_of(path))
    trial.check_end(model, scalar.tokenizer, path)
    with trial.tried(model, path):
        trial.check_apart(scalar)
        scalar.head  # noqa: B018  there is one, and it gives one number
    return scalar


def _listed(ends: int | list[int] | None) -> list[int]:
    return [] if ends is None else [ends] if isinstance(ends, int) else ends
