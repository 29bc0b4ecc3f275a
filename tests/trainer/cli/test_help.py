"""`rlhf-train --help` answers at once, and needs nothing for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tyro")


ROOT = Path(__file__).resolve().parents[3]


def python(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, in which torch has not been imported yet."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | {k: v for k, v in environment.items() if v is not None}
    for name in (k for k, v in environment.items() if v is None):
        env.pop(name, None)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


def test_help_needs_neither_torch_nor_tyro():
    done = python(
        "import sys; from trainer.cli.program import main\n"
        "print(main(['--help']), sorted({'torch', 'tyro', 'rich', 'transformers'} & set(sys.modules)))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0 []"
    assert all(f"  {name} " in done.stdout for name in ("demo", "sft", "reward", "ppo"))
