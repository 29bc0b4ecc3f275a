"""GRPO for any causal language model of transformers: one call in place of the logits.

    python examples/grpo_hf.py                                                # a tiny model, seconds on a CPU
    python examples/grpo_hf.py --model HuggingFaceTB/SmolLM2-135M-Instruct    # a real one; a folder will do, too

GRPO (https://arxiv.org/abs/2402.03300) draws a group of G replies to a prompt and compares their rewards with each
other. The usual loop makes logits [G, T, V], twice, and then log-softmax, ratio, clip, KL and a mean of them. Here
`take_apart` gives what stands before the logits, and `rk.grpo_loss` does the rest: see `learn`. The task is to add.
"""

import argparse
import copy
import random
import re

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, set_seed
from transformers import PreTrainedTokenizerFast as FastTokenizer

import rlhf_kernels as rk
from rlhf_kernels.integrations.transformers import take_apart


def tiny_model():
    """A Llama of random weights and a tokenizer that knows seven numbers."""
    vocabulary = ["<pad>", "<eos>", "+", "=", *map(str, range(7))]
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


def sample(model, prompt, group):
    """A group of replies to one prompt of token ids: ids [G, T], which of them are reply [G, T], which ended [G]."""
    prompts = torch.tensor([prompt] * group, device=model.device)  # One prompt needs no padding on the left.
    ids = model.generate(prompts, attention_mask=torch.ones_like(prompts))
    ends = torch.tensor(model.generation_config.eos_token_id, device=model.device)
    is_end = torch.isin(ids, ends) & (torch.arange(ids.shape[1], device=model.device) >= len(prompt))
    # A reply goes up to its first end token, which belongs to it; behind it there is padding.
    is_reply = is_end.cumsum(1) - is_end.int() == 0
    is_reply[:, : len(prompt)] = False
    return ids, is_reply, is_end.any(1)


def learn(policy, reference, ids, is_reply, scores, num_sequences, beta):
    """Adds the gradient of a group to that of the policy; `num_sequences` counts the replies of all groups of the step.

    Rows stay as `generate` made them, padded on the right, where causal attention does not look.
    """
    targets = ids[:, 1:].masked_fill(~is_reply[:, 1:], -100)  # The state at t predicts token t + 1; -100 costs nothing.
    with torch.no_grad():
        hidden = reference.hidden_states(input_ids=ids, use_cache=False)[:, :-1]
        ref_logp = rk.token_stats(hidden, reference.weight, targets, **reference.options).logp
    hidden = policy.hidden_states(input_ids=ids, use_cache=False)[:, :-1]
    out = rk.grpo_loss(
        hidden,
        policy.weight,
        targets,
        None,  # log-probabilities of the policy that sampled; None: it is this one, so that every ratio is one
        rk.group_advantages(scores, len(scores)),  # [G]; with all scores alike there is nothing to learn
        ref_logp=ref_logp,
        kl_coef=beta,
        reduction="sequence_mean",
        num_sequences=num_sequences,  # of the whole step, so that gradients of groups add up
        cu_seqlens=torch.arange(0, targets.numel() + 1, targets.shape[1], device=ids.device),
        **policy.options,  # what the model does to its logits: a bias, a cap, a scale
    )
    out.loss.backward()
    return out.metrics


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model of transformers: a name or a folder")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--prompts", type=int, default=8, help="prompts in a step")
    parser.add_argument("--group", type=int, default=16, help="replies to each of them")
    parser.add_argument("--new-tokens", type=int, help="longest reply; 4 for the tiny model, 48 for others")
    parser.add_argument("--lr", type=float, help="learning rate; 1e-3 for the tiny model, 1e-5 for others")
    parser.add_argument("--beta", type=float, default=0.01, help="weight of the KL to the reference")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    set_seed(args.seed)

    if args.model is None:
        question, lr, new_tokens = "{} + {} =", 1e-3, 4
        model, tokenizer = tiny_model()
    else:
        question, lr, new_tokens = "What is {} + {}? Answer with one number.", 1e-5, 48
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # eval: without dropout
    ends = model.generation_config.eos_token_id  # None, one, or a list
    ends = sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})
    ours = {"eos_token_id": ends, "pad_token_id": ends[0], "max_new_tokens": args.new_tokens or new_tokens}
    # Samples of the policy itself, and not of what its authors suggest for chats.
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ours)
    policy, reference = take_apart(model), take_apart(copy.deepcopy(model).requires_grad_(False))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr or lr)

    rows = []
    print("    step  reward  kl/token  ended  a reply")
    for step in range(args.steps):
        seen = []
        for _ in range(args.prompts):
            a, b = random.randint(0, 3), random.randint(0, 3)
            ids, is_reply, ended = sample(model, encode(tokenizer, question.format(a, b)), args.group)
            said = tokenizer.batch_decode([r[m] for r, m in zip(ids, is_reply, strict=True)], skip_special_tokens=True)
            right = torch.tensor([re.findall(r"\d+", text)[-1:] == [str(a + b)] for text in said], device=model.device)
            scores = (right & ended).float()  # The last number counts, of a reply that came to its end.
            kl = learn(policy, reference, ids, is_reply, scores, args.prompts * args.group, args.beta)["kl"]
            seen.append(torch.stack([scores.mean(), kl, ended.float().mean()]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        reward, kl, done = torch.stack(seen).mean(0).tolist()
        rows.append({"step": step, "reward": reward, "kl/token": kl, "ended": done})
        print(f"{step:8}{reward:8.3f}{kl:10.3f}{done:7.3f}  {a} + {b}: {said[0][:40]!r}", flush=True)
    return rows


if __name__ == "__main__":
    main()
