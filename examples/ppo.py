"""PPO for a language model: the whole loop on one page, to be read from top to bottom and copied.

    python examples/ppo.py                                                # a tiny model, seconds on a CPU
    python examples/ppo.py --model HuggingFaceTB/SmolLM2-135M-Instruct    # a real one; a folder will do, too

Policy, frozen reference and value model are three copies of one model. The policy replies to prompts, `reward` judges
the replies, the KL to the reference is paid for out of the reward, and PPO (https://arxiv.org/abs/1707.06347; for
language models https://arxiv.org/abs/1909.08593) makes good replies likelier. The task is a toy: say the word that the
prompt asks for. Your own goes into `ask` and `reward`.

S sequences, each a prompt and its reply, have N reply tokens in all. What has one entry per reply token lies packed in
[N], reply after reply; `cu_seqlens` [S + 1] says where each begins. No loss makes logits, [N, V].
"""

import argparse
import copy
import random
import re

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, set_seed
from transformers import PreTrainedTokenizerFast as FastTokenizer

import rlhf_kernels as rk
from rlhf_kernels.integrations.transformers import take_apart

WORDS = ["ant", "bear", "cat", "dog", "eel", "fox", "goat", "hen"]
COLUMNS = ["rollout", "reward", "kl", "tokens", "ended", "clipfrac"]


def ask():
    """A prompt."""
    return random.choice(["answer with one word: ", "say "]) + random.choice(WORDS)


def reward(prompt, reply):
    """The share of the reply's words that are the one asked for, from 0 to 1."""
    said = re.findall(r"\w+", reply.lower())
    return said.count(prompt.split()[-1]) / max(len(said), 1)


def tiny_model():
    """A Llama of random weights and a tokenizer of whole words. It babbles, and has to learn even when to stop."""
    vocabulary = ["<pad>", "<eos>", "answer", "with", "one", "word:", "say", *WORDS]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(vocabulary), initializer_range=0.1, eos_token_id=1, pad_token_id=0, **sizes)
    return LlamaForCausalLM(config), FastTokenizer(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")


def encode(tokenizer, prompt):
    """Token ids of a prompt; as a turn of a chat, where the tokenizer knows how a chat looks."""
    if not tokenizer.chat_template:
        return tokenizer(prompt).input_ids
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]


def sample(model, prompts):
    """Replies to S prompts of token ids: S sequences; and of each reply, [S]: its start, its length, did it end."""
    ends, width = model.generation_config.eos_token_id, max(map(len, prompts))
    ids = torch.tensor([[ends[0]] * (width - len(p)) + p for p in prompts], device=model.device)  # padded on the left
    starts = torch.tensor([len(p) for p in prompts], device=model.device)
    mask = torch.arange(width, device=model.device) >= width - starts[:, None]
    replies = model.generate(ids, attention_mask=mask.long())[:, width:]
    # A reply keeps its end token: a policy that is not trained on ends does not learn to stop. Behind it lies padding,
    # which may be the same token, so the first end counts.
    is_end = torch.isin(replies, torch.tensor(ends, device=model.device))
    ended = is_end.any(1)
    lengths = torch.where(ended, is_end.int().argmax(1) + 1, replies.shape[1])
    each = zip(ids, starts, replies, lengths, strict=True)
    return [torch.cat([row[width - n :], reply[:length]]) for row, n, reply, length in each], starts, lengths, ended


def reply_states(parts, sequences, starts):
    """Hidden states [N, H] that predict the reply tokens, and these tokens [N].

    The batch is padded on the right, where causal attention does not look: positions and masks are a model's ordinary
    ones. One packed row [1, T] would save the padding, but ordinary attention then sees the neighbours without a word;
    an attention that does not is in docs/integrations.md. Behind the backbone everything is packed.
    """
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    place = torch.arange(ids.shape[1], device=ids.device)
    inside = place < torch.tensor([len(s) for s in sequences], device=ids.device)[:, None]
    is_reply = inside & (place >= starts[:, None])
    hidden = parts.hidden_states(input_ids=ids, attention_mask=inside.long(), use_cache=False)
    # The state at t predicts token t + 1, so the last token of a prompt predicts the first one of its reply.
    return hidden[:, :-1][is_reply[:, 1:]], ids[:, 1:][is_reply[:, 1:]]


def logp_of(parts, sequences, starts):
    """Log-probabilities [N] of the reply tokens."""
    hidden, targets = reply_states(parts, sequences, starts)
    return rk.token_stats(hidden, parts.weight, targets, **parts.options).logp


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model of transformers: a name or a folder")
    parser.add_argument("--save", help="a folder for what was learnt")
    parser.add_argument("--rollouts", type=int, default=60, help="how often to sample and learn")
    parser.add_argument("--batch", type=int, default=64, help="replies in a rollout")
    parser.add_argument("--minibatch", type=int, default=32, help="replies per step of the optimizer")
    parser.add_argument("--micro", type=int, default=32, help="replies in memory at a time; changes nothing else")
    parser.add_argument("--epochs", type=int, default=2, help="how often to learn from a reply")
    parser.add_argument("--new-tokens", type=int, help="longest reply; 8 for the tiny model, 48 for others")
    parser.add_argument("--lr", type=float, help="learning rate; 1e-3 for the tiny model, 1e-5 for others")
    parser.add_argument("--beta", type=float, default=0.02, help="price of a nat of KL to the reference")
    parser.add_argument("--truncated", type=float, default=-1.0, help="score of a reply that did not end")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    set_seed(args.seed)

    lr, new_tokens = (1e-3, 8) if args.model is None else (1e-5, 48)
    if args.model is None:
        model, tokenizer = tiny_model()
    else:  # in float32: weights in bfloat16 do not feel an update of 1e-5
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    # eval switches dropout off for good: with it, a policy gives the same reply another probability each time.
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    # PPO wants samples of the policy itself. What the authors of a model suggest for chats (top_p, a repetition
    # penalty) draws from another distribution, and `generate` takes it up where nothing else is said: replace it whole.
    suggested, ends = model.generation_config, model.generation_config.eos_token_id  # None, one, or a list
    ends = sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})
    ours = {"eos_token_id": ends, "pad_token_id": ends[0], "max_new_tokens": args.new_tokens or new_tokens}
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ours)

    policy = take_apart(model)
    reference = take_apart(copy.deepcopy(model).requires_grad_(False))
    value_model = take_apart(copy.deepcopy(model))
    value_head = torch.zeros(policy.weight.shape[1], device=model.device, requires_grad=True)
    learners = [[*model.parameters()], [*value_model.model.parameters(), value_head]]
    optimizer = torch.optim.Adam([{"params": weights} for weights in learners], lr=args.lr or lr, eps=1e-5)

    def values_of(sequences, starts):
        return reply_states(value_model, sequences, starts)[0] @ value_head  # [N], of the states that chose the tokens

    rows = []
    print(*(f"{name:>8}" for name in COLUMNS), "  a reply")
    for rollout in range(args.rollouts):
        # 1. Sample, and score what was said.
        asked = [ask() for _ in range(args.batch)]
        sequences, starts, lengths, ended = sample(model, [encode(tokenizer, prompt) for prompt in asked])
        said = [tokenizer.decode(s[n:], skip_special_tokens=True) for s, n in zip(sequences, starts, strict=True)]
        scores = torch.tensor([reward(p, r) for p, r in zip(asked, said, strict=True)], device=model.device)
        scores = torch.where(ended, scores, args.truncated)  # Nobody knows how it would have gone on.

        # 2. Look, before anything changes. Log-probabilities come from the forward that is trained and not from the
        #    sampler, which rounds differently: so the first ratio of new to old probabilities is one.
        pieces = [(sequences[i : i + args.micro], starts[i : i + args.micro]) for i in range(0, args.batch, args.micro)]
        with torch.no_grad():
            old_logp = torch.cat([logp_of(policy, *part) for part in pieces])
            ref_logp = torch.cat([logp_of(reference, *part) for part in pieces])
            old_values = torch.cat([values_of(*part) for part in pieces])

        # 3. Advantages: every token pays for its KL, and the last one of a reply gets the score.
        cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0))
        rewards, kl = rk.shaped_rewards(scores, old_logp, ref_logp, cu_seqlens, beta=args.beta)
        advantages, returns = rk.gae(rewards, old_values, cu_seqlens, gamma=1.0, lam=0.95)
        advantages = rk.whiten(advantages)  # over the whole rollout

        # 4. Learn. Losses are divided by the tokens of the minibatch, so that the gradients of its parts add up.
        clipped = 0.0
        for minibatch in (m for _ in range(args.epochs) for m in torch.randperm(args.batch).split(args.minibatch)):
            num_tokens = int(lengths[minibatch].sum())
            for part in minibatch.split(args.micro):
                chosen = [sequences[i] for i in part]
                at = torch.cat([torch.arange(cu_seqlens[i], cu_seqlens[i + 1]) for i in part])  # their rows of [N]
                hidden, targets = reply_states(policy, chosen, starts[part])
                out = rk.ppo_loss(
                    hidden, policy.weight, targets, old_logp[at], advantages[at],
                    clip=(0.2, 0.2), num_tokens=num_tokens, **policy.options,
                )  # fmt: skip
                values = values_of(chosen, starts[part])
                value = rk.value_loss(values, returns[at], old_values=old_values[at], clip=0.2, num_tokens=num_tokens)
                (out.loss + value.loss).backward()  # They share no weight.
                clipped += float(out.metrics["clipfrac"]) * len(at) / (args.epochs * len(old_logp))
            for weights in learners:
                nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        row = rollout, scores.mean(), kl.mean(), lengths.float().mean(), ended.float().mean(), clipped
        rows.append(dict(zip(COLUMNS, map(float, row), strict=True)))
        print(*(f"{x:8.3g}" for x in rows[-1].values()), f"  {asked[0]}: {said[0][:40]!r}", flush=True)

    if args.save:
        model.generation_config = suggested
        model.save_pretrained(args.save)
        tokenizer.save_pretrained(args.save)
    return rows


if __name__ == "__main__":
    main()
