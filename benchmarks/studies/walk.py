"""How far a reader has to walk through the trainer: what modules import, and where a run goes.

    python -m benchmarks walk

prints the import closure of the algorithms and of whole stages; then runs three small stages through the command line
and prints how many files a run enters, how often its data file is opened and hashed, and who reads an option.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import hashlib
import importlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import parser

ROOT = Path(__file__).parents[2]
STARTS = ("ppo", "grpo", "loop", "stage")  # modules of trainer.stages.rl: the last one holds the stages
RUNS = (  # a subcommand, its config, an option of it, and how it is called
    ("sft", "stages.sft:SFTConfig", "lr", ()),
    ("dpo", "stages.preference.dpo:DPOConfig", "beta", ()),
    ("ppo", "stages.rl.ppo:PPOConfig", "kl_coef", ("--reward", "exact_answer", "--max-new-tokens", "4")),
)


def imports(file: Path) -> set[str]:
    """Modules that one imports when it is imported, but for those that only annotations want."""
    found: set[str] = set()

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.If):
                visit(node.orelse if "TYPE_CHECKING" in ast.dump(node.test) else [*node.body, *node.orelse])
            elif isinstance(node, ast.Try):
                visit([*node.body, *node.orelse])
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                found.update([node.module, *(f"{node.module}.{name.name}" for name in node.names)])
            elif isinstance(node, ast.Import):
                found.update(name.name for name in node.names)

    visit(ast.parse(file.read_text(encoding="utf-8")).body)
    return found


def closure(start: str) -> set[Path]:
    """The files of a module and of all that it imports from the trainer; packages are only names."""
    files, todo = set(), [start]
    while todo:
        file = ROOT / (todo.pop().replace(".", "/") + ".py")
        if file.exists() and file not in files:
            files.add(file)
            todo += [name for name in imports(file) if name.startswith("trainer.")]
    return files


def functions(file: Path) -> int:
    """How many functions a file defines, methods and inner ones among them."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return sum(isinstance(node, kinds) for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


@contextlib.contextmanager
def watched(data: Path, config: type, option: str) -> Iterator[dict[str, Any]]:
    """What a run does meanwhile: files that it enters, places that open or hash ``data`` and that read the option."""
    seen: dict[str, Any] = {"files": set(), "opened": [], "hashed": 0, "readers": collections.Counter()}
    going = True

    def place(frame: Any) -> str:
        return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_code.co_name}"

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if going and event == "open" and str(args[0]) == str(data):
            ours = [f for f in traceback.extract_stack() if f.filename.startswith(f"{ROOT}{os.sep}trainer")]
            seen["opened"].append(f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].name}")

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(f"{ROOT}{os.sep}trainer"):
            seen["files"].add(frame.f_code.co_filename)

    def read(self: Any, name: str) -> Any:
        frame = sys._getframe(1)
        if name == option and frame.f_code.co_filename.startswith(f"{ROOT}{os.sep}trainer"):
            seen["readers"][place(frame)] += 1
        return object.__getattribute__(self, name)

    def digest(file: Any, *rest: Any) -> Any:
        seen["hashed"] += getattr(file, "name", "") == str(data)
        return own_digest(file, *rest)

    own_digest = hashlib.file_digest
    sys.addaudithook(audit)  # It stays for as long as the process lives.
    config.__getattribute__ = read  # type: ignore[method-assign, assignment]
    hashlib.file_digest = digest
    sys.setprofile(profile)
    try:
        yield seen
    finally:
        going = False
        sys.setprofile(None)
        hashlib.file_digest = own_digest
        del config.__getattribute__


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit status."""
    parser("walk", __doc__).parse_args(argv)
    print(f"{'import closure of':32}{'modules':>10}{'functions':>12}")
    for name in STARTS:
        files = closure(f"trainer.stages.rl.{name}")
        print(f"{'trainer.stages.rl.' + name:32}{len(files):10}{sum(map(functions, files)):12}")
    from trainer.cli import main as rlhf_train

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        row = {"prompt": "a b", "response": "c", "chosen": "c d", "rejected": "e", "answer": "3"}
        for name, config, option, more in RUNS:
            kept = {"sft": ("prompt", "response"), "dpo": ("prompt", "chosen", "rejected"), "ppo": ("prompt", "answer")}
            data.write_text("".join(json.dumps({k: row[k] for k in kept[name]}) + "\n" for _ in range(20)))
            os.utime(data, (1, 1))  # A file that was changed just now is hashed again whenever it is asked for.
            module, _, kind = config.partition(":")
            flags = ["--data", str(data), "--out", f"{folder}/{name}", "--steps", "2", "--batch-size", "4", "--quiet"]
            with watched(data, getattr(importlib.import_module(f"trainer.{module}"), kind), option) as seen:
                status = rlhf_train([name, *flags, *more])
            print(f"\n{name}: status {status}, {len(seen['files'])} files of the trainer entered")
            print(f"  data opened by {', '.join(seen['opened'])}; hashed {seen['hashed']} times")
            print(f"  {option} read by {', '.join(seen['readers'])}")
    return 0
