"""`rlhf-train inspect`: every number against one that was counted by hand or by other means."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from trainer.cli import program as cli
from trainer.inspect.command import inspect, plain
from trainer.inspect.rows import kind_of
from trainer.inspect.screen import screen

REAL = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the folder with real data is not there")
HH = "\n\nHuman: Hi?\n\nAssistant:"


def pair(prompt: str, chosen: str, rejected: str, **more: object) -> dict[str, object]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def test_a_file_of_pairs_is_counted(write):
    rows = [
        pair("p1", "three words here", "one", category="x"),
        pair("p1", "one", "three words here", category="y"),  # the other way round: a contradiction
        pair("p2", "a b", "a", category="x"),
        pair("p2", "a b", "a", category="x"),  # again
        pair("p3", "same", "same"),
        pair("p4", "", "word"),
        pair("p5", "c d", "e f", category=["x", "y"]),
        "not json",
    ]
    held_out = write({"prompt": "P1 "}, {"prompt": "new"}, name="test.jsonl")
    facts = inspect(write(*rows), held_out=held_out, with_baselines=False)
    assert facts["file"]["lines"] == 8
    assert facts["file"]["bad"] == 1
    assert facts["file"]["first_bad"][0]["line"] == 8
    assert facts["file"]["left_out"] == {"identical replies, one preferred to the other": 1, "an empty reply": 1}
    compared = facts["comparisons"]
    assert (compared["pairs"], compared["empty_replies"], compared["identical_replies"]) == (7, 1, 1)
    assert compared["chosen_longer"].value == pytest.approx(3 / 7)
    assert compared["equal_length"] == pytest.approx(2 / 7)
    assert facts["duplicates"] == {"rows": 1, "prompts": 2, "contradictions": 1}
    assert facts["words"]["chosen"]["mean"] == pytest.approx((3 + 1 + 2 + 2 + 1 + 0 + 2) / 7)
    assert facts["words"]["rejected"]["max"] == 3
    shares = {c["name"]: c["rows"] for c in facts["categories"]}
    assert shares == {"x": 4, "y": 2, "(none)": 2}
    assert facts["overlap"] == {"held_out": 2, "same_prompt": 1, "shared_words": 0}
    told = " ".join(facts["stands_out"])
    for word in ("1 bad lines", "above 1 %", "occur more than once", "the other way", "not held out"):
        assert word in told


def test_annotators_in_either_notation_say_the_same(write):
    choices = {"ann": "chosen", "bob": "chosen", "eve": "rejected"}
    one = write(*(pair(f"p{i}", "b", "a", annotations=choices, gold="chosen") for i in range(6)), name="one.jsonl")
    rows = [
        pair(f"p{i}", *(("b", "a") if side == "chosen" else ("a", "b")), annotator=who, gold=gold)
        for i in range(6)
        for who, side, gold in (
            ("ann", "chosen", "chosen"),
            ("bob", "chosen", "chosen"),
            ("eve", "rejected", "rejected"),
        )
    ]
    ranks = {"ann": [0, 1], "bob": [0, 1], "eve": [1, 0]}
    lists = [
        {"prompt": f"p{i}", "responses": ["b", "a"], "ranks": [0, 1], "annotations": ranks, "gold": [0, 1]}
        for i in range(6)
    ]
    first = inspect(one)["annotators"]
    assert first["agreement"].observed == pytest.approx(1 / 3)
    assert first["agreement"].alpha.value < 0
    assert {k: v.value for k, v in first["gold"].items()} == {"ann": 1.0, "bob": 1.0, "eve": 0.0}
    assert inspect(write(*lists, name="lists.jsonl"))["annotators"] == first
    second = inspect(write(*rows, name="rows.jsonl"))
    assert second["annotators"]["agreement"] == first["agreement"]
    assert second["annotators"]["judgments"] == {"ann": 6, "bob": 6, "eve": 6}
    # In a row of its own, eve's "chosen" reply is a, and the gold field speaks of that row: she is wrong in ours only.
    assert second["duplicates"]["rows"] == 0


def test_ranked_lists_and_dialogues(write):
    rows = [
        {"prompt": HH, "responses": [" a", " b c", " d"], "ranks": [1, 0, 1]},
        {"prompt": HH + " x\n\nHuman: y\n\nAssistant:", "responses": [" a", " b c", " d"], "ranks": [1, 0, 2]},
        {"prompt": HH, "responses": [" a", " b", " c"], "correct": [True, True, True]},
    ]
    facts = inspect(write(*rows))
    assert facts["lists"] == {"sizes": {3: 3}, "all_tied": 1, "best_at_position": [0.0, 1.0, 0.0]}
    assert facts["comparisons"]["pairs"] == 2 + 3
    assert facts["comparisons"]["ties"] == 1 + 0 + 3
    assert facts["transcripts"] == {"transcripts": 3, "human_turns": {1: 2, 2: 1}, "replies_with_more_turns": 0}
    assert "place 2 in 100%" in " ".join(facts["stands_out"])
    assert facts["baselines"]["bag_of_words"] is None


def test_other_kinds_of_data(write, tmp_path):
    labelled = [{"prompt": f"p{i}", "response": "r", "label": i < 3} for i in range(4)]
    assert inspect(write(*labelled))["desirable"].value == 0.75
    shown = inspect(write({"question": "q", "answer": "a b"}, {"question": "q", "answer": ""}))
    assert shown["file"]["kind"] == "demonstrations"
    assert shown["words"]["response"]["max"] == 2
    assert "comparisons" not in shown
    assert inspect(write({"prompt": "p"}))["file"]["kind"] == "prompts"
    assert kind_of({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}) is not None
    with pytest.raises(ValueError, match="holds no JSON object"):
        inspect(write("oops"))
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist([pair("p", "a b", "c")]), path)
    assert inspect(path)["comparisons"]["pairs"] == 1


def test_the_command_prints_and_writes(write, tmp_path, capsys):
    choices = {"annotator with a rather long name": "chosen", "bob": "tie"}
    path = write(*(pair(f"a rather long prompt {i}", "b " * 30, "c", annotations=choices) for i in range(60)))
    assert cli.main(["inspect", str(path), "--json", str(tmp_path / "facts.json")]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for word in ("Krippendorff's alpha (nominal)", "chosen is longer", "bag of words, held out", "What stands out"):
        assert word in shown
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["comparisons"]["chosen_longer"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert cli.main(["inspect", str(tmp_path / "nothing.jsonl")]) == 2
    assert "does not exist" in capsys.readouterr().err


@needs_real_data
def test_real_pairs_beside_their_published_baseline(tmp_path):
    facts = inspect(REAL / "hh_harmless_base.jsonl.gz")
    base = facts["baselines"]
    assert base["bag_of_words"].low < 0.634 < base["bag_of_words"].high  # measured elsewhere, on other splits
    assert base["longer_reply"].high < 0.5  # shorter replies win here
    assert facts["comparisons"]["empty_replies"] == 4
    assert facts["words"]["chosen"]["mean"] < facts["words"]["rejected"]["mean"]
    ranked = inspect(REAL / "gsm8k_ranked.jsonl.gz", with_baselines=False)
    with gzip.open(REAL / "gsm8k_ranked.jsonl.gz", "rt", encoding="utf-8") as file:
        mixed = [sum(json.loads(line)["correct"]) for line in file]
    assert ranked["comparisons"]["pairs"] == sum(k * (4 - k) for k in mixed)
    assert json.loads(json.dumps(plain(ranked)))["lists"]["sizes"] == {"4": 1000}
    assert max(map(len, screen(ranked).splitlines())) <= 80
