"""docs/promises.md: every test that it names exists, and no document promises what it does not list."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "promises.md"
RESULTS = ROOT / "benchmarks" / "results"
PROMISED, UNHELD, WORDS = "promise", "promise that no test holds", "words"  # heads of the first column of tables

# What has to be quoted: words that exclude exceptions, and numbers of accuracy.
STRONG = re.compile(
    r"\b(?:n?ever|always|bitwise|twice|at most|bit (?:for|by) bit|(?:same|no) bits?|to the bit)\b", re.I
)
NUMBER = re.compile(r"\b\d+(?:\.\d+)?e-\d+\b|\b2\^-\d+\b|\b\d+(?:\.\d+)? nats\b")

TEST = re.compile(r"`([\w./]+\.(?:py|md)(?:::[\w\[\]. -]+)?)`")  # or examples that doctest runs

WHAT_TO_DO = """Quote these words in a row of docs/promises.md, beside a test that fails when they are no longer true;
write the test if there is none, or weaken the sentence. If it promises nothing, quote it in the last table there."""


class Row(NamedTuple):
    kind: str  # head of its table's first column
    quotes: list[tuple[str, str]]  # (name of a document, words in it)
    tests: list[str]
    text: str


def plain(markdown: str) -> str:
    """Text as it is read: no links, no code marks, no emphasis, one blank between words."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    return re.sub(r"\s+", " ", re.sub(r"[*`]|\\(?=\|)", "", text)).strip()


def document(name: str) -> Path:
    return ROOT / f"{name}.md" if name.isupper() else ROOT / "docs" / f"{name}.md"


DOCUMENTS = ["README", "CONTRIBUTING", *sorted(p.stem for p in PAGE.parent.glob("*.md") if p != PAGE)]


@functools.cache
def prose(name: str, tables: bool = True) -> str:
    """A document without its code."""
    text = re.sub(r"^```.*?^```$", "", document(name).read_text(encoding="utf-8"), flags=re.S | re.M)
    lines = [line for line in text.splitlines() if not line.startswith("    ")]
    return plain("\n".join(line for line in lines if tables or not line.startswith("|")))


@functools.cache
def rows() -> list[Row]:
    found, kind = [], ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells or set(line) <= set("|- "):
            kind = kind if cells else ""
        elif not kind:
            kind = cells[0]
        else:
            named = re.findall(r'"([^"]+)" \(([\w, -]+)\)', cells[0])
            quotes = [(name, plain(words)) for words, names in named for name in names.split(", ")]
            found.append(Row(kind, quotes, TEST.findall(cells[1]), line))
    return found


@functools.cache
def names_in(path: Path) -> dict[str, str]:
    """Functions, methods as ``Class::method``, and all that decorates each."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), {}
    marks = [ast.unparse(n) for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n).startswith("pytestmark")]
    for node in tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        for function in inside:
            if isinstance(function, ast.FunctionDef):
                found[prefix + function.name] = " ".join([*marks, *map(ast.unparse, function.decorator_list)])
    return found


def assert_runs(test: str, said: str) -> None:
    """It exists; and where it does not run in ``make test``, that is said beside it."""
    file, _, name = test.partition("::")
    path, base = ROOT / file, name.partition("[")[0]
    assert path.exists(), f"there is no file {file}"
    if not name:
        assert ">>>" in path.read_text(encoding="utf-8"), f"{file} has no doctest, so name a test in it"
        return
    assert name.rpartition("::")[2].startswith("test_"), f"{test} is no test"
    assert base in names_in(path), f"{file} has no test {base}"
    marks, peers = names_in(path)[base], "tests/peers/" in file or "peft" in file
    where = {
        "make test-all": "mark.slow" in marks and "pytest.param" not in marks and not peers,
        "make test-peers": peers,
        "on a GPU": "tests/gpu/device/" in file,
    }
    for words, holds in where.items():
        assert words in said or not holds, f"{test} does not run in `make test`: say {words!r} beside it"


def test_the_page_is_read_whole():
    assert {row.kind for row in rows()} == {PROMISED, UNHELD, WORDS}
    text = PAGE.read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    tables = sum(set(line) <= set("|- ") for line in lines)
    assert len(rows()) == len(lines) - 2 * tables
    assert len(rows()) > 100
    for test in TEST.findall(text):
        if "::" in test:
            assert_runs(test, text)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.quotes[0][1][:40] if row.quotes else row.text[:40])
def test_a_row_is_true_of_documents_and_tests(row: Row):
    assert row.quotes, f"wants '\"words\" (document)' in the first column: {row.text}"
    for name, words in row.quotes:
        assert document(name).exists(), f"there is no document {name}"
        assert len(words) >= 12, f"too short to be found again: {words!r}"
        there = words in prose(name)
        assert there, f"{document(name).name} no longer says {words!r}: change the row, or take it out"
    assert bool(row.tests) == (row.kind == PROMISED), f"wants a test in the second column, or another table: {row.text}"
    for test in row.tests:
        assert_runs(test, row.text)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_document_promises_what_the_page_does_not_list(name: str):
    quoted = [words for row in rows() for where, words in row.quotes if where == name]
    missing = []
    for pattern, text in ((STRONG, prose(name)), (NUMBER, prose(name, tables=False))):
        covered = [(m.start(), m.end()) for words in quoted for m in re.finditer(re.escape(words), text)]
        for found in pattern.finditer(text):
            if not any(start <= found.start() and found.end() <= end for start, end in covered):
                missing.append(f"{found.group()!r}: ...{text[max(0, found.start() - 80) : found.end() + 80]}...")
    assert not missing, "\n".join([f"{document(name).name} promises what no row quotes:", *missing, WHAT_TO_DO])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is never so.", "never"), ("without ever holding", "ever"), ("whatever it is", None),
        ("Always the same", "Always"), ("to the same bits as", "same bits"), ("bitwise", "bitwise"),
        ("an error of 1e-6", "1e-6"), ("up to 2^-23 of it", "2^-23"), ("off by 0.07 nats", "0.07 nats"),
        ("1e12 operations", None), ("statistics to at most 2", "at most"),
    ],
)  # fmt: skip
def test_what_has_to_be_quoted(text: str, found: str | None):
    match = STRONG.search(text) or NUMBER.search(text)
    assert (match and match.group()) == found


def measured(file: str, key: str = "rows") -> list[dict]:
    return json.loads((RESULTS / file).read_text())[key]


def test_numbers_of_accuracy_are_those_of_the_files():
    """As the README, benchmarks.md, quickstart.md, numerics.md and tolerance.md give them."""
    files = ("cpu-zen4-large-bf16.json", "cpu-zen4-large-bf16-score.json", "cpu-zen4-small.json")
    rounding = [r for f in files for r in measured(f) if r["dtype"] == "bf16" and r["op"] != "logits"]
    errors = {s: [r["errors"]["logp_max"] for r in rounding if r["side"] == s and "logp_max" in r.get("errors", {})]
              for s in ("ours", "peer")}  # fmt: skip
    assert f"{min(errors['peer']):.0e}" == "4e-02"
    assert f"{max(errors['peer']):.2f}" == "0.07"
    assert max(errors["ours"]) < 4e-6
    (large,) = {r["errors"]["logp_max"] for r in measured(files[0]) if r.get("side") == "ours" and r["op"] == "train"}
    assert f"{large:.0e}" == "3e-06"
    parity = json.loads((RESULTS / "trainer-cpu.json").read_text())["parity"]
    assert f"{max(parity.values()):.0e}" == "7e-07"
    share = {r["name"]: r["grad_hidden"] for r in measured("cpu-zen4-tolerance-large-fp32.json", "accuracy")}
    (plain_bf16,) = [x for name, x in share.items() if "bf16" in name]
    assert round(plain_bf16 / share["tolerance=0.0002"]) in range(38, 45), "a fortieth"
    memory = {
        r["tokens"]: r["extra_bytes"] for r in measured("cpu-zen4-memory.json") if r["contender"] == "rk.fused_loss"
    }
    assert [round(memory[n] / 1e6) for n in (2**14, 2**20)] == [225, 254]


def test_the_number_of_families_is_that_of_the_table():
    table = re.search(r"Of (\d+) families of transformers (\S+)\.\d (\d+) pass", prose("models"))
    assert table is not None
    total, version, passing = table.groups()
    assert f"Of the {total} families in transformers {version}, {passing} pass" in prose("README")
