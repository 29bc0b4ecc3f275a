"""What the documents show and doctest cannot run, runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rlhf_kernels as rk

DOCS = Path(__file__).parents[2] / "docs"


def test_a_pole_is_balanced_from_preferences(capsys):
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        for block in re.findall(r"```python\n(.*?)```", (DOCS / "cartpole.md").read_text(), re.S):
            exec(block, names)
    assert names["agreement"] > 0.7
    assert sum(names["lengths"][-3:]) / 3 > 6 * names["lengths"][0]
    assert "steps before the pole falls, of 200" in capsys.readouterr().out


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda p: p.stem)
def test_a_block_is_run_by_somebody(page):
    """By doctest, where it has prompts; else by a test that reads the page."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    plain = [b for b in blocks if not b.lstrip().startswith(">>>")]
    readers = "".join(p.read_text() for p in Path(__file__).parents[1].rglob("*.py"))
    assert not plain or page.name in readers


NAMED = re.compile(r"`(test_\w+)`(?:\s\((slow|peers)\))?")


def test_pitfalls_and_their_tests_name_each_other() -> None:
    """A test with a number stands under that number in docs/pitfalls.md; what the page names exists."""
    there: dict[str, Path] = {}
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        there |= dict.fromkeys(re.findall(r"^def (test_\w+)\(", path.read_text(), re.M), path)
    named: set[str] = set()
    _, *sections = re.split(r"^### ", (DOCS / "pitfalls.md").read_text(), flags=re.M)
    for section in sections:
        number = int(section.partition(".")[0])
        tests = NAMED.findall(section)
        assert tests, f"pitfall {number} names no test"
        for name, mark in tests:
            assert name in there, name
            assert not name.startswith("test_pitfall_") or name.startswith(f"test_pitfall_{number:02}_") or number == 1
            path = there[name]
            slow = re.search(rf"@pytest\.mark\.slow\n(?:@.*\n)*def {name}\(", path.read_text()) is not None
            peers = "peers" in path.parts or "peft" in path.name
            assert (mark == "slow", mark == "peers") == (slow, peers), name
        named |= {name for name, _ in tests}
    numbered = {name for name in there if name.startswith("test_pitfall_")}
    assert len(sections) == 28
    assert len(numbered) > 50
    assert numbered <= named, numbered - named


@pytest.fixture(scope="module")
def reference() -> Any:
    spec = importlib.util.spec_from_file_location("reference_pages", DOCS / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["api.md", "api-integrations.md"])
def test_the_reference_is_what_the_docstrings_say(page: str, reference: Any) -> None:
    written = (DOCS / page).read_text(encoding="utf-8")
    assert reference.PAGES[page]() == written, "make it anew: python docs/reference.py"


def test_the_reference_has_every_public_name(reference: Any) -> None:
    assert sorted(name for group in reference.GROUPS.values() for name in group) == list(rk.__all__)
    page = reference.library()
    assert "- `old_logp`: [...] log-probabilities in nats under the policy that sampled" in page
    assert "- `softcap: float | None`: logits become softcap * tanh(logits / softcap)" in page
    assert page.count("**Returns:**") > 15
    assert page.count("```python\n>>> ") >= len(rk.__all__) - 3


LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
ELSEWHERE = ("http://", "https://", "mailto:")


def anchors(page: Path) -> set[str]:
    """What a code host makes of headings."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda p: p.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.S | re.M)
    for target in (a or b for a, b in LINK.findall(text)):
        if target.startswith(ELSEWHERE):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target
