"""What the sampler says it did, and what is made of it where sampler and trainer differ."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.rollouts import world
from tests.support.small import small_policy
from trainer.data.packing import Sample, pack
from trainer.models.loading import load_policy
from trainer.models.tiny import byte_tokenizer, tiny_policy
from trainer.sampling import rollout
from trainer.sampling.rollout import Rollout, _continue, sample
from trainer.stages.rl import ppo
from trainer.stages.rl import stage as rl_stage


def test_the_log_probabilities_of_the_sampler_stand_in_the_rows_of_their_tokens() -> None:
    rollout = Rollout([Sample([2, 3, 4, 5], 2), Sample([6, 7], 1)], [False, False], [[-1.0, -2.0], [-3.0]])
    packed = rollout.pack("cpu")
    assert rollout.logp_of(packed).tolist() == [0, -1, -2, 0, -3, 0]
    assert rollout.sampler_delta(packed, torch.tensor([9.0, -1.5, -2.0, 9.0, -3.25, 9.0])) == 0.5


@pytest.mark.parametrize("sampler", ["cached", "generate"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_sampler_draws_from_the_policy_it_reports(temperature: float, sampler: Any) -> None:
    """First tokens of many responses to one prompt come as often as their reported probability says."""
    policy, source = small_policy(), torch.Generator().manual_seed(0)
    rollout = sample(
        policy, [[2, 3]] * 4000, max_new_tokens=1, generator=source, temperature=temperature, sampler=sampler
    )
    first = torch.tensor([rollout.response(i)[0] for i in range(4000)])
    with torch.no_grad():
        logits = policy.logits(policy.hidden(pack([Sample([2, 3], 2)]))[-1:])[0] / temperature
    p = torch.softmax(logits, -1)
    error = (torch.bincount(first, minlength=len(p)) / 4000 - p).abs()
    assert bool((error < 5 * (p * (1 - p) / 4000).sqrt() + 1e-3).all())
    reported = torch.tensor([x[0] for x in rollout.sampler_logp])
    torch.testing.assert_close(reported, p.log()[first], rtol=1e-4, atol=1e-4)


def test_the_first_batch_draws_from_the_generator_and_the_others_from_their_own() -> None:
    """A batch says the same whatever happens in the others, and no two of them draw the same numbers."""
    policy, one = small_policy(), [[2, 3]] * 6
    alone, source = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    tokens, logp = _continue(policy, one, 7, alone, 1.0, 1.0)
    whole = sample(policy, one, max_new_tokens=7, generator=source)
    for i in range(6):
        said = whole.response(i)
        assert (tokens[i, : len(said)].tolist(), logp[i, : len(said)].tolist()) == (said, whole.sampler_logp[i])
    assert torch.equal(alone.get_state(), source.get_state())

    def spoken(prompts: list[list[int]]) -> list[list[int]]:
        found = sample(policy, prompts, max_new_tokens=7, generator=torch.Generator().manual_seed(1), batch_size=6)
        return [found.response(i) for i in range(len(prompts))]

    three = spoken(one * 3)
    assert three[:6] != three[6:12] != three[12:] != three[:6]
    assert spoken([[4, 5]] * 6 + one + one)[6:] == three[6:]


def test_the_configuration_says_how_many_are_sampled_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counted(policy: Any, prompts: Any, *rest: Any) -> Any:
        seen.append(len(prompts))
        return _continue(policy, prompts, *rest)

    monkeypatch.setattr(rollout, "_continue", counted)
    cfg = ppo.PPOConfig(**world(tmp_path) | {"steps": 1}, sample_batch=4)
    rl_stage.ppo(cfg)
    assert seen[:3] == [4, 4, 2]
    with pytest.raises(ValueError, match="sample_batch: got 0, want at least 1"):
        rl_stage.ppo(replace(cfg, sample_batch=0))


def padded(rows: int) -> Any:
    """A policy whose head has more rows than its tokenizer has tokens, and likes them."""
    tok = byte_tokenizer(["ab"], 258)
    made = tiny_policy(tok, 0, hidden=32, layers=1)
    made.model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        made.model.lm_head.weight[len(tok) :] = 3 * made.model.lm_head.weight[: rows - len(tok)]
    return type(made)(made.model, tok)


@pytest.mark.parametrize("sampler", ["cached", "generate"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_beyond_the_tokens_are_nobody(sampler: Any, temperature: float):
    mine = padded(400)
    said = sample(
        mine, [[40, 41]] * 32, max_new_tokens=8, generator=torch.Generator().manual_seed(0), sampler=sampler,
        temperature=temperature,
    )  # fmt: skip
    assert max(max(s.tokens) for s in said.samples) < len(mine.tokenizer)
    packed = said.pack("cpu")
    with torch.no_grad():
        stats = mine.stats(packed)
        kept = (mine.hidden(packed) @ mine.weight.T)[:, : len(mine.tokenizer)].log_softmax(-1)
    torch.testing.assert_close(
        stats.logp[packed.mask], kept.gather(1, packed.targets.clamp(0)[:, None])[packed.mask, 0]
    )
    if temperature:
        assert said.sampler_delta(packed, stats.logp) < 1e-4


@pytest.mark.parametrize("sampler", ["cached", "generate"])
def test_a_response_stops_at_each_end(tmp_path: Path, sampler: Any):
    tiny_policy(byte_tokenizer(["ab"], 258), 0, hidden=32, layers=1).save(tmp_path)
    options = json.loads((file := tmp_path / "generation_config.json").read_text())
    file.write_text(json.dumps(options | {"eos_token_id": [7, 1, 9]}))
    mine = load_policy(str(tmp_path))
    assert mine.ends == [1, 7, 9]
    source = torch.Generator().manual_seed(0)
    said = sample(mine, [[40, 41]] * 64, max_new_tokens=100, generator=source, sampler=sampler)
    last = [said.response(i)[-1] for i in range(64)]
    assert {1, 7, 9} == set(last) & {1, 7, 9}
    assert not any({1, 7, 9} & set(said.response(i)[:-1]) for i in range(64))
    assert said.truncated == [x not in (1, 7, 9) for x in last]
