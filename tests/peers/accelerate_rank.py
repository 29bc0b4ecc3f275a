"""One of two processes that train together by the loop of docs/integrations.md, each on every other sequence.

``python accelerate_rank.py FOLDER``; the rank is in the environment, as ``torchrun`` would put it there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from page import defined


def main(folder: str) -> None:
    torch.set_num_threads(1)
    names, rank = defined(), int(os.environ["RANK"])
    model = names["policy"]()
    halves = (tuple(x[rank::2] for x in batch) for batch in names["batches"]())
    losses = names["train_accelerated"](model, halves, 2)
    torch.save({"losses": losses, "weights": model.state_dict()}, Path(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
