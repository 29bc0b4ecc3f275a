"""Every causal-LM family of transformers, taken apart: logits, loss and gradients, and the table in docs/models.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rlhf_kernels as rk
from tests.support.problems import A_FEW, ulp

transformers = pytest.importorskip("transformers")

from rlhf_kernels.integrations.transformers import Parts, take_apart  # noqa: E402
from tests.support import model_families as families  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet():
    with families.quiet():
        yield


@pytest.mark.parametrize("family", families.NAMES)
def test_a_family(family: str):
    """It comes apart and together again, or is refused for the reason in the table of docs/models.md."""
    row = str(families.tried(family))
    if transformers.__version__ in families.in_document()[1].partition("\n")[0]:
        assert row in families.in_document()[1].splitlines(), "make it anew: python -m tests.support.model_families"
    else:
        assert row.endswith("passes |") or row.split(" | ")[0] not in families.in_document()[1]


def test_the_table_counts_right():
    first, _, _, _, *rows = families.in_document()[1].splitlines()
    assert len(rows) == len({row.split(" | ")[0] for row in rows})
    verdicts = [row.split(" | ")[-1] for row in rows]
    counts = [sum(v.startswith(x) for v in verdicts) for x in ("passes |", "refused: ", "not tried: ")]
    assert sum(counts) == len(rows)
    assert first.partition(" families ")[0] == f"Of {len(rows)}"
    assert first.endswith(f" {counts[0]} pass, {counts[1]} refused, {counts[2]} not tried.")


def plain_loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def our_loss(parts: Parts, ids: Tensor) -> Tensor:
    hidden = parts.hidden_states(input_ids=ids)[:, :-1]
    return rk.sft_loss(hidden, parts.weight, ids[:, 1:], **parts.options).loss


def gradients(loss: Tensor, model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}


FAMILIES = ["gpt2", "llama", "gemma2", "cohere", "granite", "hyperclovax", "minicpm3", "bert", "phi", "opt", "olmo2"]


@pytest.mark.parametrize(
    "family", [*FAMILIES, "qwen2", "qwen3", "gemma3_text", "gpt_neox", "mistral", "mixtral", "falcon"]
)
def test_every_gradient_is_the_models_own(family: str):
    """Relative L2 of all parameters together within a few ulps of the model's float32, tied weights summed."""
    model = families.build(family)
    ids = families.tokens(90)
    parts = take_apart(model)
    want, mine = plain_loss(model, ids), our_loss(parts, ids)
    assert abs(mine - want).item() <= A_FEW * ulp(torch.float32) * want.item()
    right, got = gradients(want, model), gradients(mine, model)
    assert got.keys() == right.keys()
    error = sum((got[n] - right[n]).square().sum() for n in right) ** 0.5
    norm = sum(x.square().sum() for x in right.values()) ** 0.5
    assert norm > 0
    assert error <= 4 * A_FEW * ulp(torch.float32) * norm


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])  # tied and untied; neither casts to float32 on its way
def test_gradients_in_double(family: str):
    model = families.build(family).double()
    parts, ids = take_apart(model), families.tokens(90)
    right, got = gradients(plain_loss(model, ids), model), gradients(our_loss(parts, ids), model)
    assert got.keys() == right.keys()
    for name, x in right.items():
        assert (got[name] - x).norm() <= 1e-10 * max(x.norm().item(), 1e-3), name
