"""Models of transformers as policies: from disk, whatever follows their head, in every part of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.model_families import build
from tests.support.small import ragged, small_policy
from trainer.data.packing import Sample, pack
from trainer.models import attention
from trainer.models.loading import load_policy, load_scalar

COMMON: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip


def family(name: str, factor: float = 4) -> Any:
    """Random, and with weights large enough that attention shows in the logits."""
    model = build(name)
    with torch.no_grad():
        for parameter in model.base_model.parameters():
            if parameter.ndim > 1 and parameter is not model.get_output_embeddings().weight:
                parameter.mul_(factor)
    return model


def saved(path: Path, model: Any) -> str:
    model.save_pretrained(path)
    tokenizer = small_policy().tokenizer
    tokenizer.add_tokens([f"word{i}" for i in range(len(tokenizer), model.config.get_text_config().vocab_size)])
    tokenizer.save_pretrained(path)
    return str(path)


def test_models_that_would_fail_in_silence_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str, why: str) -> None:
        with pytest.raises(ValueError, match=rf"^model: (?s:.)*{why}") as error:
            load_policy(path)
        assert Path(path).name in str(error.value)
        assert "inputs=" not in str(error.value), "advice for callers of take_apart, not of the trainer"

    torch.manual_seed(0)
    capped = transformers.Gemma2Config(**COMMON, head_dim=8, attn_logit_softcapping=5.0)
    refused(saved(tmp_path / "capped", transformers.Gemma2ForCausalLM(capped)), "its attention needs softcap")
    refused(saved(tmp_path / "recurrent", family("mamba")), "the attention of MambaForCausalLM does not keep packed")
    refused(saved(tmp_path / "run on", family("bart", 1)), "do not give the logits that BartForCausalLM gives")
    refused(saved(tmp_path / "own", build("gptj")), "has an attention that cannot be told")
    scaled = saved(tmp_path / "scaled", build("cohere"))
    with monkeypatch.context() as patch:
        forward = transformers.CohereForCausalLM.forward

        def shifted(self: Any, *args: Any, **inputs: Any) -> Any:
            out = forward(self, *args, **inputs)
            out.logits = out.logits + torch.arange(out.logits.shape[-1])
            return out

        patch.setattr(transformers.CohereForCausalLM, "forward", shifted)
        refused(scaled, "CohereForCausalLM cannot be taken apart: its logits are not")
    with monkeypatch.context() as patch:
        right = attention.padded_attention
        patch.setattr(attention, "padded_attention", lambda *args: 2 * right(*args))
        refused(scaled, "packed sequences do not give the logits that CohereForCausalLM gives by itself")
        patch.setattr(attention, "padded_attention", lambda *args: right(*args).view(3, 5))
        refused(scaled, "CohereForCausalLM fails on packed sequences: RuntimeError: shape")
    assert load_policy(scaled).head == {"logit_scale": 0.25}
    tokenizer = small_policy().tokenizer
    tokenizer.eos_token = None
    tokenizer.save_pretrained(scaled)
    refused(scaled, "has no end-of-sequence token")


@pytest.mark.parametrize("factor", [0.1, 1])
@pytest.mark.parametrize("name", ["lfm2_moe", "xglm", "zamba"])
def test_small_weights_hide_no_leak(name: str, factor: float, tmp_path: Path) -> None:
    path = saved(tmp_path / name, family(name, factor))
    with pytest.raises(ValueError, match=rf"^model: the attention of \w+ does not keep packed .* apart .*{name}"):
        load_policy(path)


@pytest.mark.parametrize(("sees", "seen"), [(0, 7), (3, 4), (4, 3), (7, 0)])
@pytest.mark.parametrize("smooth", [True, False])
def test_neither_neighbour_is_seen(
    sees: int, seen: int, smooth: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of the one sequence in one row of the other: far below rounding, or without a gradient."""
    # The last norm of the one keeps the sum of its outputs; that of the other makes them small.
    model, right = family("olmo" if smooth else "llama", 1), attention.padded_attention
    if not smooth:
        torch.nn.init.constant_(model.model.norm.weight, 1e-4)
    path = saved(tmp_path, model)

    def leaky(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        mine = torch.arange(len(v))[:, None, None] == sees
        what = 1e-12 * v[seen].mean() if smooth else v[seen].detach().mean()
        return right(q, k, v, *rest) + mine * what

    monkeypatch.setattr(attention, "padded_attention", leaky)
    with pytest.raises(ValueError, match=r"^model: the attention of \w+ does not keep packed sequences"):
        load_policy(path)


@pytest.mark.parametrize("name", ["mixtral", "granitemoe", "ctrl"])
def test_rounding_is_no_leak(name: str, tmp_path: Path) -> None:
    """Experts round by how many rows they get at once, and some models write over their embeddings."""
    policy = load_policy(saved(tmp_path, family(name)))
    if name != "ctrl":
        texts = [[Sample([2, 3, 4], 1), Sample([token] * 9, 1)] for token in range(2, 20)]
        with torch.no_grad():
            first, *others = (policy.hidden(pack(text))[:3] for text in texts)
        assert not all(torch.equal(first, other) for other in others), "then bits could be compared"


def test_a_reward_model_that_leaks_is_refused(tmp_path: Path) -> None:
    """A sequence classifier of transformers, which no policy was before."""
    leaks, keeps = transformers.StableLmForSequenceClassification, transformers.LlamaForSequenceClassification
    for name, kind in {"leaks": leaks, "keeps": keeps}.items():
        torch.manual_seed(0)
        saved(tmp_path / name, kind(kind.config_class(**COMMON, num_labels=1)))
    with pytest.raises(ValueError, match=r"^model: the attention of StableLmFor.* does not keep packed .*leaks"):
        load_scalar(str(tmp_path / "leaks"))
    assert load_scalar(str(tmp_path / "keeps")).raw_scores(pack(ragged(3))).shape == (3,)
