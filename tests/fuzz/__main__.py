"""``python -m tests.fuzz``: many calls, or one again."""

from __future__ import annotations

import argparse
import collections
import faulthandler
import sys
import time

import torch

from tests.fuzz.run import make, trial
from tests.fuzz.show import report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--seed", type=int, help="one call, shown in full")
    parser.add_argument("--most", type=int, default=20, help="faults after which to stop")
    asked = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # then memory that nobody has written holds NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    if asked.seed is not None:
        verdict, text = trial(asked.seed)
        print(text or report(make(asked.seed), verdict))
        return int(verdict == "fault")
    tally: collections.Counter[str] = collections.Counter()
    began = time.monotonic()
    for seed in range(asked.start, asked.start + asked.calls):
        if sys.stderr.isatty() or seed % 250 == 0:  # after a crash it is there, or not far from there
            sys.stderr.write(f"\r{seed} ")
        verdict, text = trial(seed)
        tally[verdict] += 1
        if text:
            print(f"\n{text}", flush=True)
        if tally["fault"] >= asked.most:
            break
    print(f"\n{sum(tally.values())} calls in {time.monotonic() - began:.0f} s: {dict(tally)}")
    return int(tally["fault"] > 0)


if __name__ == "__main__":
    sys.exit(main())
