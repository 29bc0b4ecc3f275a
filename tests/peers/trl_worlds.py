"""A tiny policy, its tokenizer and data, for TRL's trainers: made on the spot, nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import DPOConfig, GRPOConfig


def tokenizer(words: int) -> PreTrainedTokenizerFast:
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, words)}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def saved(model: PreTrainedModel, folder: Path) -> str:
    """With its tokenizer."""
    model.save_pretrained(folder)
    tokenizer(model.config.vocab_size).save_pretrained(folder)
    return str(folder)


def sizes(words: int, layers: int = 2) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "vocab_size": words, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
        "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.1,
    }  # fmt: skip


def policy(folder: Path, words: int, layers: int = 2) -> str:
    """Whose predictions are far from uniform."""
    model = LlamaForCausalLM(LlamaConfig(**sizes(words, layers), tie_word_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return saved(model, folder)


def capped(folder: Path, words: int) -> str:
    options = {"final_logit_softcapping": 3.0, "head_dim": 8, "attn_implementation": "eager"}
    return saved(Gemma2ForCausalLM(Gemma2Config(**sizes(words), **options)), folder)


def scaled(folder: Path, words: int) -> str:
    return saved(CohereForCausalLM(CohereConfig(**sizes(words), logit_scale=0.25)), folder)


def routed(folder: Path, words: int) -> str:
    return saved(MixtralForCausalLM(MixtralConfig(**sizes(words), num_local_experts=2, num_experts_per_tok=2)), folder)


def text(length: int, words: int, seed: int) -> str:
    drawn = torch.randint(3, words, (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in drawn.tolist())


def prompts(words: int, length: int = 5) -> Dataset:
    return Dataset.from_list([{"prompt": text(length - i % 2, words, i)} for i in range(12)])


def pairs(words: int, length: int = 9) -> Dataset:
    """Prompts and replies of several lengths."""
    return Dataset.from_list(
        [
            {
                "prompt": text(length // 2 + i % 3, words, i),
                "chosen": text(length - i % 4, words, 100 + i),
                "rejected": text(length // 2 + i % 5, words, 200 + i),
            }
            for i in range(12)
        ]
    )


def reward(completions: list[str], **_: Any) -> list[float]:
    """Of the words only, so that the same completions get the same advantages whoever trains."""
    return [sum(int(w[1:]) % 7 for w in c.split() if w[1:].isdigit()) / 10 for c in completions]


COMMON: dict[str, Any] = {
    "max_steps": 3, "learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 1e9,
    "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "bf16": False,
    "disable_tqdm": True, "use_cpu": True, "gradient_checkpointing": False, "dataloader_num_workers": 0, "seed": 3,
}  # fmt: skip


def grpo_config(folder: Path, **options: Any) -> GRPOConfig:
    own = {"num_generations": 4, "max_completion_length": 7, "num_iterations": 2, "beta": 0.04}
    return GRPOConfig(output_dir=str(folder / "out"), **{**COMMON, **own, **options})


def dpo_config(folder: Path, **options: Any) -> DPOConfig:
    return DPOConfig(output_dir=str(folder / "out"), **{**COMMON, "learning_rate": 0.02, **options})


class Watch(TrainerCallback):
    """The gradients of every step, as they reach the optimizer."""

    def __init__(self) -> None:
        self.grads: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.grads.append({name: p.grad.clone() for name, p in named if p.grad is not None})
