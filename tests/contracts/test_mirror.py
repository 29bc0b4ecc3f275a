"""The tests of a module are found by its name, and those named after a pitfall by its number."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
MIRRORED = {"trainer": TESTS / "trainer", "rlhf_kernels": TESTS / "kernels"}

# Modules, or whole folders of them, whose tests have another name: these hold them.
ELSEWHERE = {
    "rlhf_kernels/backends/cuda_gae.py": "gpu/host/test_gae_dispatch.py",
    "rlhf_kernels/backends/eager.py": "kernels/engine/test_products.py",
    "rlhf_kernels/backends/native_head.py": "kernels/backends/native/test_native.py",
    "rlhf_kernels/backends/native_rows.py": "kernels/backends/native/test_native.py",
    "rlhf_kernels/backends/triton": "gpu/interpret/test_head.py",
    "rlhf_kernels/backends/triton_gae.py": "gpu/interpret/test_gae.py",
    "rlhf_kernels/backends/triton_rewards.py": "gpu/interpret/test_gae_rewards.py",
    "rlhf_kernels/engine/call.py": "kernels/checks/test_arguments.py",
    "rlhf_kernels/engine/explain.py": "kernels/checks/test_heads.py",
    "rlhf_kernels/engine/nodes.py": "kernels/engine/test_compiled.py",
    "rlhf_kernels/engine/op.py": "kernels/engine/test_token_stats.py",
    "rlhf_kernels/engine/span.py": "kernels/engine/test_fused.py",
    "rlhf_kernels/integrations/heads.py": "kernels/integrations/test_peft.py",
    "rlhf_kernels/integrations/openrlhf.py": "peers/test_openrlhf.py",
    "rlhf_kernels/integrations/trl.py": "peers/test_trl.py",
    "rlhf_kernels/integrations/verl.py": "peers/test_verl.py",
    "rlhf_kernels/losses/reduce.py": "kernels/losses/test_policy.py",
    "rlhf_kernels/losses/surrogate.py": "kernels/losses/test_policy.py",
    "rlhf_kernels/reference": "kernels/losses/test_by_hand.py",
    "rlhf_kernels/types.py": "kernels/backends/native/test_native.py",
    "trainer/cli/machine.py": "trainer/cli/test_doctor.py",
    "trainer/cli/run_stage.py": "trainer/cli/test_program.py",
    "trainer/demo/measures.py": "trainer/demo/test_stage.py",
    "trainer/demo/summary.py": "trainer/demo/test_stage.py",
    "trainer/inspect/facts.py": "trainer/inspect/test_command.py",
    "trainer/inspect/stage.py": "trainer/run/test_mark.py",
    "trainer/stages/preference/dpo.py": "trainer/stages/preference/test_loop.py",
    "trainer/stages/rl/method.py": "trainer/stages/rl/test_loop.py",
    "trainer/run/durable.py": "trainer/run/test_checkpoint.py",
    "trainer/stages/rl/stage.py": "trainer/stages/test_stages.py",
    "trainer/stages/rl/samples.py": "trainer/stages/test_stages.py",
    "trainer/stages/rl/value.py": "trainer/stages/rl/test_shared_value.py",
    "trainer/training/progress.py": "trainer/training/test_state.py",
}


def functions(file: Path) -> list[str]:
    """Functions and classes that a module has for others."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return [n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]


def names_in(file: Path) -> list[str]:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return [n.name for n in body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]


def named_after(module: Path) -> list[Path]:
    """``test_NAME.py`` in the same room of the mirror, or all files of a folder ``NAME`` there."""
    package, *rooms = module.relative_to(ROOT).parent.parts
    room = MIRRORED[package].joinpath(*rooms)
    return [f for f in (room / f"test_{module.stem}.py", *(room / module.stem).glob("test_*.py")) if f.exists()]


MODULES = [
    file for package in MIRRORED for file in sorted((ROOT / package).rglob("*.py"))
    if not file.name.startswith("__") and functions(file)
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_a_module_has_its_tests_where_one_looks_for_them(module: Path) -> None:
    name = module.relative_to(ROOT).as_posix()
    told = [test for place, test in ELSEWHERE.items() if name == place or name.startswith(f"{place}/")]
    found = named_after(module)
    assert found or told, f"{name} wants tests in a file of its name, or a line in ELSEWHERE"
    assert not (found and told), f"{name} has tests of its name: take it out of ELSEWHERE"
    assert all(names_in(file) for file in found or [TESTS / told[0]])


def test_nothing_is_elsewhere_in_vain() -> None:
    assert all((ROOT / place).exists() for place in ELSEWHERE)


def test_every_folder_of_the_mirror_is_a_room_or_a_module() -> None:
    for package, mirror in MIRRORED.items():
        for folder in (f for f in mirror.rglob("*") if f.is_dir() and f.name != "__pycache__"):
            place = ROOT / package / folder.relative_to(mirror)
            there = place.is_dir() or place.with_suffix(".py").exists()
            assert there, f"{folder.relative_to(ROOT)} mirrors nothing"


def pitfalls() -> Counter[str]:
    return Counter(
        test for file in TESTS.rglob("test_*.py") for test in names_in(file) if re.match(r"test_pitfall_\d\d_", test)
    )


def test_a_pitfall_is_held_by_one_test_of_its_name() -> None:
    assert len(pitfalls()) > 50
    assert set(pitfalls().values()) == {1}


def test_the_page_of_pitfalls_lists_them_all() -> None:
    """Each under its number, as ``docs/pitfalls.md`` has it."""
    text = (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\btest_pitfall_\d\d_\w+", text)) == set(pitfalls())
