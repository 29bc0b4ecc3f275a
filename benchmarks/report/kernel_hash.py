"""Which kernel sources a GPU result belongs to, and which have changed since the last one.

python -m benchmarks kernels        # says what has changed; never fails
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks import command

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("rlhf_kernels/backends/triton/*.py", "rlhf_kernels/backends/*_gae.py", "rlhf_kernels/backends/*_rewards.py",
           "csrc/core/*.h", "csrc/cuda/*")  # fmt: skip
RESULTS = ROOT / "benchmarks" / "results"


def hashes(root: Path = ROOT) -> dict[str, str]:
    """The first 16 digits of each kernel source's SHA-256."""
    files = sorted(path for pattern in SOURCES for path in root.glob(pattern) if path.is_file())
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files}


def measured(results: Path = RESULTS) -> dict[str, set[str]]:
    """For every source the hashes under which some committed GPU result was made."""
    found: dict[str, set[str]] = {}
    for file in sorted(results.glob("gpu-*.json")):
        content = json.loads(file.read_text())
        if content.get("about", {}).get("dry"):
            continue  # no GPU was there
        for name, digest in content.get("sources", {}).items():
            found.setdefault(name, set()).add(digest)
    return found


def report(now: dict[str, str], then: dict[str, set[str]]) -> str:
    """One line for each source that no GPU has run as it is now."""
    lines = [
        f"{name}: {'changed since it was last measured' if name in then else 'never measured'} on a GPU"
        for name, digest in now.items()
        if digest not in then.get(name, set())
    ]
    return "\n".join(lines) or "every kernel source was measured on a GPU as it is now"


def main(argv: Sequence[str] | None = None) -> None:
    command.parser("kernels", __doc__).parse_args(argv)
    print(report(hashes(), measured()))
