"""One command for every measurement: ``python -m benchmarks VERB ...``."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

VERBS = {  # verb: (the module whose ``main`` it calls, what it does)
    "compare": ("studies.compare", "time, memory and error of this library beside its peers"),
    "memory": ("studies.memory", "peak memory of a loss against the number of tokens"),
    "update": ("studies.update", "time and memory of the trainer's PPO update beside losses that hold the logits"),
    "check": ("studies.check", "compare speed and memory with the committed baseline"),
    "tolerance": ("studies.tolerance", "what `tolerance=` saves, and the error that it makes"),
    "learning": ("studies.learning", "whether models learn the same with a tolerance"),
    "real-logits": ("studies.real_logits", "how few entries of a real gradient matter"),
    "monitors": ("studies.monitors", "record, replay and draw the runs that calibrate the monitors"),
    "walk": ("studies.walk", "how far a reader has to walk through the trainer"),
    "gpu": ("gpu.__main__", "everything there is to run on a GPU; the same as python -m benchmarks.gpu"),
    "report": ("report.tables", "tables and figures of result files"),
    "kernels": ("report.kernel_hash", "which kernel sources have changed since a GPU last ran them"),
}


def parser(verb: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks {verb}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; its exit status."""
    listed = "\n".join(f"  {verb:<12} {line}" for verb, (_, line) in VERBS.items())
    own = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures this library. Results go to the screen and, with --out, into JSON.",
        epilog=f"verbs:\n{listed}\n\nPytest has a small grid of everything: pytest benchmarks/ --benchmark-only",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own.add_argument("verb", choices=VERBS, metavar="VERB", help="one of those below; VERB --help lists its options")
    own.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="its options")
    given = own.parse_args(argv)
    return importlib.import_module(f"benchmarks.{VERBS[given.verb][0]}").main(given.options) or 0
