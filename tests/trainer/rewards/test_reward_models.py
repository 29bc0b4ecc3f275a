"""What a reward model reads: the ids, the prompt and the end that it has learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import policy, tokenizer
from tests.support.small import small_scalar
from tests.trainer.rewards.test_functions import RECORDS, reward
from trainer.data.chat import ends, render_of
from trainer.data.encoding import encode_pairs
from trainer.data.packing import Sample, pack
from trainer.models.loading import load_scalar
from trainer.models.policy import ScalarModel, scalar_from
from trainer.models.tiny import byte_tokenizer, tiny_policy
from trainer.rewards.sources import reward_from, with_end
from trainer.sampling.rollout import Rollout

USER = [{"role": "user", "content": "What is 2 + 2?"}]

CPU = torch.device("cpu")


def test_a_reward_model_is_not_asked_about_ids_that_it_has_not(tmp_path: Path):
    tok = byte_tokenizer(["ab"], 258)
    judge = scalar_from(tiny_policy(tok, 0, hidden=32, layers=1), torch.Generator().manual_seed(0))
    judge.set_statistics(torch.tensor([-1.0, 1.0]))
    judge.save(tmp_path)
    reward = reward_from(str(tmp_path), tok, max_length=64, max_tokens=512, device=CPU)
    beyond = Rollout([Sample([40, 41, len(tok) + 3, 1], 1)], [False], [[0.0] * 3])
    with pytest.raises(
        ValueError, match=rf"has {len(tok)} rows of embeddings, and a response holds the id {len(tok) + 3}"
    ):
        reward(beyond, [{"prompt": "a", "extra": {}}])


@pytest.mark.parametrize("own", [True, False])
def test_a_reward_model_of_others_is_read_where_its_own_forward_reads(tmp_path: Path, own: bool):
    """Transformers reads the last token that is not padding, of the whole rendered conversation."""
    judge = scalar_from(policy("smollm2"), torch.Generator().manual_seed(0))
    judge.model.config.pad_token_id = judge.tokenizer.eos_token_id
    if own:
        judge.set_statistics(torch.tensor([-1.0, 1.0]))
    judge.save(tmp_path)
    again = load_scalar(str(tmp_path))
    assert isinstance(again, ScalarModel)
    assert again.own is own
    tok = again.tokenizer
    prompt = render_of(tok)(USER)
    (mine,) = encode_pairs(tok, [prompt], ["It is 4."], 900)
    rollout = Rollout([mine], [False], [[0.0] * 9])
    reward = reward_from(str(tmp_path), tok, max_length=900, max_tokens=999, device=CPU)
    (got,) = reward(rollout, [{"prompt": prompt, "extra": {}}])
    talk = [*USER, {"role": "assistant", "content": "It is 4."}]
    ids = tok.apply_chat_template(talk, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        theirs = again.model(input_ids=ids, use_cache=False).logits[0, 0]
        ends = again.raw_scores(mine_packed(mine))[0]
    torch.testing.assert_close(got, ends if own else theirs)


def mine_packed(one: Sample) -> Any:
    from trainer.data.packing import pack

    return pack([one])


def test_a_reward_model_reads_the_end_that_it_has_learnt():
    tok = tokenizer("gemma2")
    turn, eos = ends(tok)[-1], tok.eos_token_id
    assert turn != eos
    assert with_end(Sample([5, 6, eos], 1), turn) == Sample([5, 6, turn], 1)


ROLLOUT = Rollout([Sample([2, 3, 4, 1], 2), Sample([2, 2, 5], 1)], [False, True], [[0.0, 0.0], [0.0, 0.0]])


def test_a_reward_model_reads_the_same_end_in_training_and_in_ppo(tmp_path: Path) -> None:
    """Pitfall 7: a response that ended scores as its text does in training, also under another tokenizer."""
    model = small_scalar()
    model.save(tmp_path / "same")
    texts = encode_pairs(model.tokenizer, ["a b", "a"], ["c", "a d"], 64, ended=[True, False])
    assert [s.tokens for s in texts] == [s.tokens for s in ROLLOUT.samples]
    with torch.no_grad():
        wanted = model.scores(pack(texts))
    torch.testing.assert_close(reward(str(tmp_path / "same"))(ROLLOUT, RECORDS), wanted)

    stranger = load_scalar(saved_bytes(tmp_path), torch.Generator().manual_seed(0))
    stranger.save(tmp_path / "other")
    texts = encode_pairs(stranger.tokenizer, ["a b", "a"], ["c", "a d"], 64, ended=[True, False])
    with torch.no_grad():
        torch.testing.assert_close(reward(str(tmp_path / "other"))(ROLLOUT, RECORDS), stranger.scores(pack(texts)))


def saved_bytes(path: Path) -> str:
    """A policy with a tokenizer of its own."""
    tiny_policy(byte_tokenizer(["a b c d"], 300), 0, hidden=32).save(path / "bytes")
    return str(path / "bytes")
