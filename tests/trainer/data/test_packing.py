"""A sequence means the same alone, packed with others in any order, and padded: in packing, attention, sampling."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.small import LETTERS, ragged, small_policy, small_scalar
from trainer.data.packing import IGNORE, Sample, pack, within_budget
from trainer.models.attention import NAME, similar_lengths
from trainer.models.policy import Policy
from trainer.sampling.rollout import sample

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
COMMON = {
    "vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
FAMILIES = {
    "llama": transformers.LlamaConfig(**COMMON),
    "qwen2": transformers.Qwen2Config(**COMMON),
    "qwen3": transformers.Qwen3Config(**COMMON, head_dim=8),
    "mistral-window": transformers.MistralConfig(**COMMON, sliding_window=5),
    "gemma2-softcap": transformers.Gemma2Config(
        **COMMON, head_dim=8, query_pre_attn_scalar=8, sliding_window=5, attn_logit_softcapping=None,
        final_logit_softcapping=2.0,
    ),
    "granite-scale": transformers.GraniteConfig(**COMMON, logits_scaling=3.0),
    "cohere-scale": transformers.CohereConfig(**COMMON, logit_scale=0.5),
    "gpt2": transformers.GPT2Config(vocab_size=31, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=1),
}  # fmt: skip


@pytest.mark.parametrize("order", ["alone", "reversed", "sorted"])
def test_values_and_scores_do_not_depend_on_company(order: str) -> None:
    policy, scalar, samples = small_policy(), small_scalar(), ragged(12)
    with torch.no_grad():
        packed = pack(samples)
        wanted = [policy.stats(packed).logp, policy.stats(packed).entropy, scalar.values(packed)]
        scores = scalar.raw_scores(packed)
        places = list(range(12)) if order != "sorted" else sorted(range(12), key=lambda i: len(samples[i].tokens))
        places = places[::-1] if order == "reversed" else places
        groups = [[i] for i in places] if order == "alone" else [places]
        starts = packed.cu_seqlens.tolist()
        for group in groups:
            other = pack([samples[i] for i in group])
            rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in group])
            got = [policy.stats(other).logp, policy.stats(other).entropy, scalar.values(other)]
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b[rows], **CLOSE)
            torch.testing.assert_close(scalar.raw_scores(other), scores[group], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_transformers_alone(family: str) -> None:
    """The witness is transformers' own attention on one sequence at a time; hidden states, logits and gradients."""
    torch.manual_seed(0)
    ours, theirs = (
        transformers.AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]), attn_implementation=name).eval()
        for name in (NAME, "eager")
    )
    assert (ours.config._attn_implementation, theirs.config._attn_implementation) == (NAME, "eager")
    with torch.no_grad():
        for parameter in ours.parameters():  # as they are initialised, attention moves the logits by less than rounding
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    theirs.load_state_dict(ours.state_dict())
    policy = Policy(ours, None)
    samples = [Sample([t % 31 for t in s.tokens], s.prompt_length) for s in ragged(5, longest=20)]
    packed = pack(samples)
    hidden = policy.hidden(packed)
    logits = policy.logits(hidden)
    logits.square().mean().backward()

    alone = [theirs(input_ids=torch.tensor([s.tokens]), use_cache=False).logits[0] for s in samples]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-4 * float(logits.detach().std()))
    torch.cat(alone).square().mean().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad - other.grad).norm() <= 1e-4 * other.grad.norm() + 1e-9, name


@pytest.mark.parametrize("same_length", [True, False])
def test_sampler_agrees_with_the_training_forward(same_length: bool) -> None:
    """Left padding, the cache and dropped rows change nothing, though prompts hold pad and end-of-sequence ids."""
    policy = small_policy()
    prompts = [[0, 1, 4, 5], [1, 1, 7, 9], [0, 0, 0, 3]] if same_length else [[0], [1, 0, 3, 8, 9, 4], [6, 1]]
    rollout = sample(policy, prompts * 8, max_new_tokens=24, generator=torch.Generator().manual_seed(3))
    assert any(rollout.truncated) or any(len(rollout.response(i)) < 24 for i in range(24))
    assert [s.tokens[: s.prompt_length] for s in rollout.samples] == prompts * 8
    packed = rollout.pack("cpu")
    with torch.no_grad():
        logp = policy.stats(packed).logp
    assert rollout.sampler_delta(packed, logp) < 1e-5
    for i, stopped in enumerate(rollout.truncated):
        response = rollout.response(i)
        assert (response[-1] == 1) == (not stopped)
        assert 1 not in response[:-1]


def test_greedy_sampling_is_the_argmax_of_the_training_forward() -> None:
    policy, generator = small_policy(), torch.Generator()
    rollout = sample(policy, [[2, 3], [4, 5, 6, 7]], max_new_tokens=6, generator=generator, temperature=0)
    with torch.no_grad():
        packed = rollout.pack("cpu")
        likeliest = policy.logits(policy.hidden(packed)).argmax(-1)
    assert likeliest[packed.mask].tolist() == packed.targets[packed.mask].tolist()


def test_the_shift_happens_once() -> None:
    packed = pack([Sample([5, 6, 7, 8], 2), Sample([9, 4], 1), Sample([3], 1)])
    assert packed.targets.tolist() == [IGNORE, 7, 8, IGNORE, 4, IGNORE, IGNORE]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 0]
    assert packed.cu_seqlens.tolist() == [0, 4, 6, 7]
    assert packed.last_rows.tolist() == [3, 5, 6]


def test_an_empty_sample_is_refused() -> None:
    with pytest.raises(ValueError, match=r"samples: got lengths \[2, 0\]"):
        pack([Sample([1, 2], 1), Sample([], 0)])


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 100))
@settings(deadline=None, max_examples=60)
def test_micro_batches_hold_everything_once_and_keep_the_budget(sizes: list[int], budget: int) -> None:
    parts = within_budget(sizes, budget)
    assert [i for part in parts for i in part] == list(range(len(sizes)))
    assert all(len(part) == 1 or sum(sizes[i] for i in part) <= budget for part in parts)
    groups = list(similar_lengths(sizes))
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    assert all(len(g) * max(sizes[i] for i in g) <= 1.5 * sum(sizes[i] for i in g) for g in groups)


def test_select_finds_its_rows() -> None:
    samples = ragged(6)
    packed = pack(samples)
    part, rows = packed.select([4, 1])
    again = pack([samples[4], samples[1]])
    assert torch.equal(part.input_ids, again.input_ids)
    assert torch.equal(part.targets, again.targets)
    assert torch.equal(part.cu_seqlens, again.cu_seqlens)
    assert torch.equal(packed.input_ids[rows], again.input_ids)
    assert len(LETTERS) + 2 == small_policy().weight.shape[0]
