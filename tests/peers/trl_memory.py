"""One training step of one trainer, in a process of its own: prints how far memory rose above where it began, in MB.

``python trl_memory.py {grpo|dpo} {ours|theirs} FOLDER``, where FOLDER holds a policy of ``WORDS`` words.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

WORDS, LENGTH = 32768, 60


def peak(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def main(kind: str, whose: str, folder: str) -> None:
    import torch
    import trl
    import trl_worlds as world
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf_kernels.integrations.trl import FusedDPOTrainer, FusedGRPOTrainer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    common = {"model": model, "processing_class": AutoTokenizer.from_pretrained(folder)}
    if kind == "grpo":
        options = {"max_completion_length": LENGTH, "num_iterations": 1, "beta": 0.0}
        trainer_of = FusedGRPOTrainer if whose == "ours" else trl.GRPOTrainer
        common |= {"reward_funcs": world.reward, "train_dataset": world.prompts(WORDS, LENGTH)}
        args = world.grpo_config(Path(folder), max_steps=1, **options)
    else:
        trainer_of = FusedDPOTrainer if whose == "ours" else trl.DPOTrainer
        common |= {"train_dataset": world.pairs(WORDS, LENGTH)}
        args = world.dpo_config(Path(folder), max_steps=1)
    trainer = trainer_of(args=args, **common)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = peak("VmRSS")
    trainer.train()
    print(f"peak {(peak('VmHWM') - before) / 1024:.1f} {trainer.state.log_history[0]['loss']!r}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
