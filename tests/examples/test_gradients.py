"""The gradients of PPO and GRPO in examples/ are those of plain torch on logits, in float64, one sequence at a time."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.examples.pages import page

transformers = pytest.importorskip("transformers")

from rlhf_kernels.integrations.transformers import take_apart  # noqa: E402

EOS = 1
BATCH, MINIBATCH, EPOCHS, BETA, CLIP = 6, 4, 2, 0.3, 0.2


class Watch:
    """A run of ppo.py: what was sampled in each rollout, and weights and gradients at each step of the optimizer."""

    def __init__(self, ppo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.models: list[Any] = []
        self.samples: list[Any] = []
        self.orders: list[Tensor] = []
        self.steps: list[tuple[list[list[Tensor]], list[list[Tensor]]]] = []
        watch, sample, apart, randperm = self, ppo.sample, ppo.take_apart, torch.randperm

        class Adam(torch.optim.Adam):
            def step(self, closure: Any = None) -> Any:
                groups = [group["params"] for group in self.param_groups]
                weights = [[p.detach().clone() for p in group] for group in groups]
                grads = [[torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in g] for g in groups]
                watch.steps.append((weights, grads))
                return super().step(closure)

        monkeypatch.setattr(ppo, "sample", lambda *args: self.samples.append(sample(*args)) or self.samples[-1])
        monkeypatch.setattr(ppo, "take_apart", lambda model: self.models.append(model) or apart(model))
        monkeypatch.setattr(torch.optim, "Adam", Adam)
        monkeypatch.setattr(torch, "randperm", lambda n: self.orders.append(randperm(n)) or self.orders[-1])


def with_weights(model: Any, weights: list[Tensor]) -> Any:
    """A copy in float64."""
    made = copy.deepcopy(model).double()
    for p, w in zip(made.parameters(), weights, strict=True):
        p.data.copy_(w)
        p.requires_grad_(True)
    return made


def logp(model: Any, sequence: Tensor, start: int) -> Tensor:
    """Of the reply tokens, from logits."""
    scores = model(input_ids=sequence[None]).logits[0].log_softmax(-1)
    return torch.stack([scores[t - 1, sequence[t]] for t in range(start, len(sequence))])


def values(model: Any, head: Tensor, sequence: Tensor, start: int) -> Tensor:
    states = model.model(input_ids=sequence[None]).last_hidden_state[0]
    return states[start - 1 : len(sequence) - 1] @ head


def score(sequence: Tensor, start: int) -> float:
    """As the page defines it, from the tokens: 0 is padding, 1 the end, the last token of a prompt is asked for."""
    reply = sequence[start:].tolist()
    if reply[-1] != EOS:
        return -1.0
    words = [x for x in reply if x > EOS]
    return words.count(int(sequence[start - 1])) / max(len(words), 1)


def advantages_of(rewards: list[float], value: list[float]) -> list[float]:
    """Generalised advantages by their definition, with gamma 1 and lambda 0.95."""
    found, ahead = [], 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + (value[t + 1] if t + 1 < len(rewards) else 0.0) - value[t]
        ahead = delta + 0.95 * ahead
        found.append(ahead)
    return found[::-1]


def norm_clipped(grads: list[Tensor]) -> list[Tensor]:
    norm = torch.stack([g.norm() for g in grads]).norm()
    return [g * min(1.0, 1.0 / (float(norm) + 1e-6)) for g in grads]


def same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-4) -> bool:
    """Whether there is a gradient at all, once both are found to be the same."""
    ours_, theirs_ = (torch.cat([g.double().flatten() for g in grads]) for grads in (ours, theirs))
    assert (ours_ - theirs_).norm() <= tolerance * theirs_.norm()
    return bool(theirs_.norm() > 0)


@pytest.mark.parametrize("micro", [MINIBATCH, 3])
def test_ppo(micro: int, monkeypatch: pytest.MonkeyPatch):
    ppo = page("ppo")
    watch = Watch(ppo, monkeypatch)
    sizes = f"--rollouts 2 --batch {BATCH} --minibatch {MINIBATCH} --micro {micro} --epochs {EPOCHS}"
    ppo.main([*sizes.split(), "--beta", str(BETA), "--lr", "2e-3"])
    model, reference, value_model = watch.models
    reference = copy.deepcopy(reference).double()
    minibatches = [m.tolist() for order in watch.orders for m in order.split(MINIBATCH)]
    each = len(minibatches) // 2
    assert len(watch.steps) == len(minibatches) == 2 * EPOCHS * 2

    clips, alive = [0, 0], []
    for rollout, (sequences, starts, _, _) in enumerate(watch.samples):
        pairs = [(s, int(n)) for s, n in zip(sequences, starts, strict=True)]
        (policy_then, value_then), _ = watch.steps[rollout * each]
        with torch.no_grad():
            then, judge = with_weights(model, policy_then), with_weights(value_model, value_then[:-1])
            old_logp = [logp(then, *pair) for pair in pairs]
            ref_logp = [logp(reference, *pair) for pair in pairs]
            old_values = [values(judge, value_then[-1].double(), *pair) for pair in pairs]
        advantages, returns = [], []
        for pair, old, ref, value in zip(pairs, old_logp, ref_logp, old_values, strict=True):
            rewards = (-BETA * (old - ref)).tolist()
            rewards[-1] += score(*pair)
            advantages.append(torch.tensor(advantages_of(rewards, value.tolist()), dtype=torch.float64))
            returns.append(advantages[-1] + value)
        flat = torch.cat(advantages)
        advantages = [(a - flat.mean()) / (flat.var(correction=0) + 1e-8).sqrt() for a in advantages]

        for step in range(rollout * each, (rollout + 1) * each):
            (policy_now, value_now), (policy_grads, value_grads) = watch.steps[step]
            now, judge = with_weights(model, policy_now), with_weights(value_model, value_now[:-1])
            head = value_now[-1].double().requires_grad_()
            losses, squares = [], []
            for i in minibatches[step]:
                ratio = (logp(now, *pairs[i]) - old_logp[i]).exp()
                gain, bound = ratio * advantages[i], ratio.clamp(1 - CLIP, 1 + CLIP) * advantages[i]
                losses.append(-torch.min(gain, bound))
                v, old = values(judge, head, *pairs[i]), old_values[i]
                error = (v - returns[i]).square()
                clipped = (old + (v - old).clamp(-CLIP, CLIP) - returns[i]).square()
                squares.append(0.5 * torch.max(error, clipped))
                clips = [clips[0] + int((bound < gain).sum()), clips[1] + int((clipped > error).sum())]
            torch.cat(losses).mean().backward()
            torch.cat(squares).mean().backward()
            alive.append(same(policy_grads, norm_clipped([p.grad for p in now.parameters()])))
            learnt = [torch.zeros_like(p) if p.grad is None else p.grad for p in [*judge.parameters(), head]]
            alive.append(same(value_grads, norm_clipped(learnt)))
    assert min(clips) > 0  # Both bounds have been met, and most minibatches are not beyond them as a whole.
    assert sum(alive) > 0.7 * len(alive)


SIZES = {"vocab_size": 20, "eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": None}
LLAMA = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


@pytest.mark.parametrize(("family", "sizes"), [("Llama", LLAMA), ("GPT2", GPT2)], ids=["turned", "counted"])
def test_padding_moves_no_position(family: str, sizes: dict[str, int]):
    """Neither where positions turn queries and keys, nor where they are counted from the first token."""
    torch.manual_seed(0)
    cls = getattr(transformers, {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel"}[family])
    model = cls(cls.config_class(**SIZES, **sizes, initializer_range=0.3)).eval()
    prompts = [torch.randint(2, 20, (n,)).tolist() for n in (2, 9, 5)]
    ppo = page("ppo")
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=6, eos_token_id=[EOS], pad_token_id=EOS, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    said: list[Any] = []
    generate = model.generate
    model.generate = lambda *args, **more: said.append(generate(*args, **more)) or said[0].sequences
    sequences, starts, lengths, _ = ppo.sample(model, prompts)
    found = ppo.logp_of(take_apart(model), sequences, starts)
    alone = torch.cat([logp(model, s, int(n)) for s, n in zip(sequences, starts, strict=True)])
    assert torch.allclose(found, alone, rtol=1e-4, atol=1e-5)
    scores = torch.stack(said[0].logits, 1).log_softmax(-1)  # [S, T, V] of the sampler
    at_sampling = [scores[i, torch.arange(n), s[-n:]] for i, (s, n) in enumerate(zip(sequences, lengths, strict=True))]
    assert torch.allclose(found, torch.cat(at_sampling), rtol=1e-4, atol=1e-5)


def test_grpo():
    grpo = page("grpo_hf")
    torch.manual_seed(0)
    (model, _), (other, _) = (
        grpo.tiny_model(),
        grpo.tiny_model(),
    )  # unlike each other: the KL shows
    prompt, replies = [6, 2, 7, 3], [[9, EOS, EOS], [5, 5, EOS], [EOS, EOS, EOS], [4, 8, 9]]
    model.generation_config.eos_token_id = [EOS]
    model.generate = lambda prompts, **_: torch.cat([prompts, torch.tensor(replies)], 1)
    ids, is_reply, ended = grpo.sample(model, prompt, len(replies))
    assert ended.tolist() == [True, True, True, False]
    assert is_reply.sum(1).tolist() == [2, 3, 1, 3]
    assert not is_reply[:, : len(prompt)].any()

    scores, beta, num_sequences = torch.tensor([1.0, 0.0, 0.5, 0.0]), 0.04, 16
    grpo.learn(take_apart(model), take_apart(other), ids, is_reply, scores, num_sequences, beta)
    plain, reference = with_weights(model, [*model.parameters()]), copy.deepcopy(other).double()
    advantages = (scores - scores.mean()) / (scores.std(correction=0) + 1e-6)
    for row, n, advantage in zip(ids, is_reply.sum(1).tolist(), advantages, strict=True):
        row = row[: len(prompt) + n]
        mine, apart = logp(plain, row, len(prompt)), logp(reference, row, len(prompt)).detach()
        kl = (apart - mine).exp() - (apart - mine) - 1
        ratio = (mine - mine.detach()).exp()
        (-(ratio * advantage - beta * kl).mean() / num_sequences).backward()
    assert same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    assert all(p.grad is None for p in other.parameters())
