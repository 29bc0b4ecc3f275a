"""TRL's DPO with one class changed: `FusedDPOTrainer` for `DPOTrainer`; everything else is TRL's.

    python examples/dpo_trl.py                                                # a tiny model, seconds on a CPU
    python examples/dpo_trl.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data trl-lib/ultrafeedback_binarized
    python examples/dpo_trl.py --plain                                        # TRL's own class, to compare with

Wants `pip install "trl>=1.16,<1.17"`. Without --data the pairs are a toy: the polite reply is preferred.
"""

import argparse
import copy
import random
import tempfile

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed
from transformers import PreTrainedTokenizerFast as FastTokenizer
from trl import DPOConfig, DPOTrainer

from rlhf_kernels.integrations.trl import FusedDPOTrainer

THINGS = ["bread", "coffee", "honey", "milk", "rice", "salt", "tea", "water"]
POLITE, RUDE = ["certainly here is your", "with pleasure your"], ["what again your", "take your"]


def tiny_model():
    """A Llama of random weights and a tokenizer of whole words."""
    words = sorted({word for text in ("may i have", *POLITE, *RUDE) for word in text.split()} | {*THINGS})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(vocabulary), initializer_range=0.1, eos_token_id=1, pad_token_id=0, **sizes)
    return LlamaForCausalLM(config), FastTokenizer(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def toy_pairs(count=256):
    """Prompts, each with a chosen and a rejected reply."""
    things = [random.choice(THINGS) for _ in range(count)]
    chosen = [f" {random.choice(POLITE)} {thing}" for thing in things]
    rejected = [f" {random.choice(RUDE)} {thing}" for thing in things]
    return Dataset.from_dict({"prompt": [f"may i have {t}" for t in things], "chosen": chosen, "rejected": rejected})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model of transformers: a name or a folder")
    parser.add_argument("--data", help="preference pairs: a name of the hub or a folder")
    parser.add_argument("--out", help="a folder for checkpoints and the trained model; by default nothing is kept")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8, help="pairs per step")
    parser.add_argument("--lr", type=float, help="learning rate; 1e-3 for the tiny model, 1e-6 for others")
    parser.add_argument("--plain", action="store_true", help="TRL's own class")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    set_seed(args.seed)

    if args.model is None:
        model, tokenizer = tiny_model()
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as nowhere:
        config = DPOConfig(
            output_dir=args.out or nowhere,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.lr or (1e-6 if args.model else 1e-3),
            beta=0.1,
            bf16=torch.cuda.is_available(),
            logging_steps=max(args.steps // 10, 1),
            save_strategy="no",
            report_to="none",
        )
        kind = DPOTrainer if args.plain else FusedDPOTrainer  # This is the change.
        trainer = kind(
            model,
            ref_model=copy.deepcopy(model),
            args=config,
            train_dataset=load_dataset(args.data, split="train") if args.data else toy_pairs(),
            processing_class=tokenizer,
        )
        trainer.train()
        if args.out:
            trainer.save_model()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
