"""An objective of your own on the fused head, held to plain torch on logits: SAPO, which the library does not have.

    python examples/own_loss.py                                                # a tiny model, seconds on a CPU
    python examples/own_loss.py --model HuggingFaceTB/SmolLM2-135M-Instruct    # a real one; a folder will do, too

SAPO (https://arxiv.org/abs/2511.20347) has a soft gate where PPO has a clip. Ten steps learn from replies that were
scored once, so that ratios leave one and the gate is felt; `gap` is how far the two gradients are apart.
"""

import argparse

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import rlhf_kernels as rk
from rlhf_kernels.integrations.transformers import take_apart

PROMPT = "Say hello to a friend: "
SCORES = {"hello my dear friend": 1.0, "good to see you": 0.5, "what is it now": -0.5, "go away": -1.0}  # of replies


def sapo(logp, old_logp, advantages):
    """The loss of each token, and its ratio."""
    ratio, tau = (logp - old_logp).exp(), torch.where(advantages > 0, 1.0, 1.05)
    return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages, ratio


def objective(stats, cu_seqlens, old_logp, advantages, share):
    """A sum over the given tokens, and (sum, count) of what to log; `stats` has logp, entropy, lse and mean_logit.

    Tokens come in pieces, so that a mean is a sum of shares that are known beforehand.
    """
    loss, ratio = sapo(stats.logp, old_logp, advantages)
    return (share * loss).sum(), {"ratio": (ratio.detach().sum(), ratio.new_tensor(len(ratio)))}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model of transformers: a name or a folder")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    if args.model is None:  # Bytes are its tokens, and a line's end is the end.
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        model, lr = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)), 3e-3
        prompt, *replies = [list(text.encode()) for text in (PROMPT, *(f"{reply}\n" for reply in SCORES))]
    else:
        model, lr = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), 1e-5
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        prompt, end = tokenizer.encode(PROMPT), tokenizer.eos_token_id
        replies = [[*tokenizer.encode(reply, add_special_tokens=False), end] for reply in SCORES]
    parts, optimizer = take_apart(model.eval()), torch.optim.Adam(model.parameters(), lr=lr)

    # [B, T], padded on the right. The state at t predicts token t + 1; the target -100 is nothing to be learnt.
    ids = pad_sequence([torch.tensor(prompt + reply[:-1]) for reply in replies], batch_first=True)
    targets = pad_sequence([torch.tensor([-100] * (len(prompt) - 1) + reply) for reply in replies], True, -100)
    share = 1 / ((targets != -100).sum(1, keepdim=True) * len(replies)).expand(targets.shape)
    advantages = rk.group_advantages(torch.tensor([*SCORES.values()]), len(replies))[:, None].expand(targets.shape)
    old_logp, rows = None, []
    for _ in range(10):
        logits = model(input_ids=ids).logits.float()
        logp = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        old_logp = logp.detach() if old_logp is None else old_logp
        plain = (share * sapo(logp, old_logp, advantages)[0])[targets != -100].sum()
        theirs = torch.cat([g.flatten() for g in torch.autograd.grad(plain, [*model.parameters()])])
        hidden, given = parts.hidden_states(input_ids=ids), (old_logp, advantages, share)
        loss, metrics = rk.fused_loss(hidden, parts.weight, targets, objective, per_token=given, **parts.options)
        optimizer.zero_grad()
        loss.backward()
        ours = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
        row = {"loss": loss, "plain": plain, "ratio": metrics["ratio"], "gap": (ours - theirs).norm() / theirs.norm()}
        rows.append({name: x.item() for name, x in row.items()})
        print(*(f"{name} {x:8.2e}  " for name, x in rows[-1].items()))
    return rows


if __name__ == "__main__":
    main()
