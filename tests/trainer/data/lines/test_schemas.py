"""Lines of several schemas in one file, half characters wherever they stand, and types that JSON has not."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.support.small import write
from trainer.data import reading as data
from trainer.data.lines import rows
from trainer.evaluation.alignment_tax import read_task
from trainer.inspect.command import inspect
from trainer.models.tiny import byte_tokenizer
from trainer.rewards.exact_answer import exact_answer
from trainer.rewards.http import _json
from trainer.stages import split

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
MIXED: list[dict[str, Any]] = [
    {"messages": TURNS, "prompt": None, "response": None, "chosen": None, "text": None},
    {"messages": None, "prompt": "p", "response": "r", "chosen": None, "text": None},
    {"messages": None, "prompt": None, "response": None, "chosen": None, "text": "\n\nHuman: q\n\nAssistant: r"},
]


def parquet(path: Path, table: Any) -> Path:
    pytest.importorskip("pyarrow.parquet").write_table(table, path)
    return path


@pytest.fixture(params=["jsonl", "parquet"])
def mixed(request: Any, tmp_path: Path) -> Path:
    if request.param == "jsonl":
        return write(tmp_path / "d.jsonl", MIXED)
    return parquet(tmp_path / "d.parquet", pytest.importorskip("pyarrow").Table.from_pylist(MIXED))


def test_fields_that_are_null_count_as_absent(mixed: Path, tmp_path: Path) -> None:
    """For training, for rewards, for inspect and for split."""
    talk = {"prompt": "\n\nHuman: q\n\nAssistant:", "response": " r"}
    assert data.read(mixed, "demonstrations") == [talk, {"prompt": "p", "response": "r"}, talk]
    assert [set(row) for _, row in rows(mixed)] == [{"messages"}, {"prompt", "response"}, {"text"}]
    facts = inspect(mixed, with_baselines=False)
    assert (facts["file"]["kind"], facts["file"]["bad"]) == ("demonstrations", 0)
    path = write(tmp_path / "p.jsonl", ({"prompt": f"p{i}", "answer": None, "topic": "t"} for i in range(20)))
    assert data.read(path, "prompts")[0]["extra"] == {"topic": "t"}
    split.split(split.SplitConfig(data=path, out=tmp_path / "out", held_out=0.5, quiet=True))
    assert "null" not in (tmp_path / "out" / "train.jsonl").read_text()


def test_a_null_inside_of_a_field_is_what_it_was(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"prompt": "p", "known": {"a": None}, "list": [None]}])
    assert data.read(path, "prompts")[0]["extra"] == {"known": {"a": None}, "list": [None]}
    path = write(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": None}, TURNS[1]]}])
    with pytest.raises(ValueError, match="content must be text, got null"):
        data.read(path, "demonstrations")


@pytest.mark.parametrize(
    "line",
    [
        r'{"messages": [{"role": "user", "content": "a \ud83d"}, {"role": "assistant", "content": "b"}]}',
        r'{"prompt": "p", "response": "r", "\udc00 topic": "t"}',
        r'{"prompt": "p", "response": "r", "known": {"a": [1, "\uDBFF\u0041"]}}',
    ],
    ids=["in a message", "in a name", "in a field for rewards"],
)
@pytest.mark.parametrize("kind", ["demonstrations", "prompts"])
def test_half_a_character_makes_a_bad_line_wherever_it_stands(tmp_path: Path, line: str, kind: Any) -> None:
    path, notes = tmp_path / "d.jsonl", list[str]()
    good = json.dumps({"prompt": "p", "response": "r \U0001f600", "known": r"\ud83d"}) + "\n"
    path.write_text(good * 150 + line + "\n" + good * 50)
    records = data.read(path, kind, note=notes.append)
    assert len(records) == 200
    assert "line 151: half a surrogate pair" in notes[0]
    assert "\U0001f600" in json.dumps(records[0], ensure_ascii=False)


def test_numbers_that_json_has_not_reach_rewards_and_endpoints(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "p", "answer": 12345678901234567890123, "x": NaN, "y": -1e999}\n')
    (record,) = data.read(path, "prompts")
    assert exact_answer(["p"], ["12345678901234567890123"], [record["extra"]]) == [1.0]
    sent = json.loads(_json({"prompts": ["p"], "responses": ["r"], "extras": [record["extra"]]}))["extras"][0]
    assert sent == {"answer": 12345678901234567890123, "x": None, "y": None}


def test_types_that_json_has_not_reach_rewards_and_endpoints(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    columns = {
        "prompt": ["p"], "answer": pa.array([Decimal("1.50")]), "raw": pa.array([b"\xff"]),
        "day": pa.array([datetime.date(2024, 5, 6)]), "list": pa.array([[1, 2]]),
        "at": pa.array([1_714_953_600_123_456_789], pa.timestamp("ns")),
        "took": pa.array([1_500_000_001], pa.duration("ns")),
        "clock": pa.array([3_600_000_000_001], pa.time64("ns")),
    }  # fmt: skip
    path = parquet(tmp_path / "d.parquet", pa.table(columns))
    (record,) = data.read(path, "prompts")
    extra = record["extra"]
    assert extra["at"] == datetime.datetime(2024, 5, 6, 0, 0, 0, 123456)
    assert (extra["took"], extra["clock"]) == (datetime.timedelta(seconds=1.5), datetime.time(1))
    assert exact_answer(["p"], ["3/2"], [extra]) == [1.0]
    assert read_task(path, byte_tokenizer(["p"], 260)).answers == ["1.50"]
    sent = json.loads(_json({"prompts": ["p"], "responses": ["r"], "extras": [extra]}))["extras"][0]
    assert sent["list"] == [1, 2]
    assert (sent["day"], sent["answer"], sent["at"]) == ("2024-05-06", "1.50", "2024-05-06 00:00:00.123456")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["x", "prompt", "prompt"])
    with pytest.raises(ValueError, match="'prompt' is the name of two columns, want one"):
        data.read(parquet(tmp_path / "d.parquet", table), "prompts")
