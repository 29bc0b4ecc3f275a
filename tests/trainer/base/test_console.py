"""What reaches the terminal: letters, and nothing that steers it, whoever wrote them."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.folders import change
from tests.support.pipelines import environment  # noqa: F401 (a fixture)
from tests.support.small import small_policy, write
from trainer.base import console
from trainer.base.console import UNSEEN, say, visible
from trainer.cli import program as cli
from trainer.cli.doctor import Advice, screen
from trainer.cli.machine import Machine
from trainer.data import reading as data
from trainer.data.formats import Record
from trainer.monitors.monitor import Alarm
from trainer.rewards.http import NoAnswer
from trainer.rewards.sources import _from_function
from trainer.run import folder as run_folder
from trainer.run import log
from trainer.stages.rl import watch
from trainer.stages.rl.kl_controller import KLController

ROOT = Path(__file__).parents[3]
STEER = (
    "\x1b]0;mine\x07", "\x1b[2J\x1b[H", "\x1b]52;c;aGk=\x07", "\x9b31m", "\x9d0;mine\x9c", "\x90q", "\x08\x08", "a\rb",
    "\x0b", "\x0c", "\x00", "\x7f", "\x1bc", "\u202egnp", "\u2066x\u2069", "\u200f", "\u061c", "\u2028", "\u2029",
    "\x85", "\ud800", "\U000e0041",
)  # fmt: skip
EVIL = "begin " + "".join(STEER) + " [bold]x[/bold] [link=http://z]y[/link] :smile: end"
PLAIN = EVIL.encode("unicode_escape").decode()
ODD = EVIL.replace("\ud800", "")  # as a line of data may hold it
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # of rich itself


def clean(text: str, *, rich: bool = False) -> str:
    """The text, if no terminal minds it."""
    text = COLOURS.sub("", text).replace("\r", "") if rich else text
    assert not UNSEEN.search(text), ascii(UNSEEN.findall(text))
    return text


def test_what_steers_is_shown_as_an_escape_and_letters_stay() -> None:
    assert visible(EVIL) == PLAIN.replace("\\u0", "\\u0")
    for kept in (
        "plain\ttext\n",
        "\u00fc \u4e2d \u05d0 \u0627",
        "\U0001f469\u200d\U0001f469",
        "e\u0301",
        "\u200c",
        "\u00ad",
    ):
        assert visible(kept) == kept
    assert all(UNSEEN.fullmatch(chr(i)) for i in (*range(9), *range(11, 32), *range(127, 160)))


def shown(log: log.RunLog) -> None:
    """Everything by which a run speaks."""
    with log.start(EVIL, 2) as bar:
        bar.step({EVIL: 1.0})
        bar.step({"loss": 1.0, "".join(STEER): 1.0})
    log.note(EVIL)
    log.table(EVIL, [(EVIL, EVIL), ("a", EVIL)])
    log.samples(EVIL, [{"prompt": EVIL, EVIL: EVIL, "after": "x\ny"}])
    log.warn(EVIL)


def test_a_log_file_gets_letters_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown(log.RunLog(tmp_path))
    told = capsys.readouterr()
    assert clean(told.out).count(PLAIN) >= 9
    assert clean(told.err) == PLAIN + "\n"


def test_a_terminal_gets_letters_and_colours_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And brackets of others are no markup, nor are their colons pictures."""
    rich_console = pytest.importorskip("rich.console")
    terminal = rich_console.Console(force_terminal=True, width=2000)
    monkeypatch.setattr(console, "_rich_console", lambda: terminal)
    shown(log.RunLog(tmp_path))
    told = capsys.readouterr().out
    assert clean(told, rich=True).count(PLAIN) >= 9
    assert "\x1b]8" not in told


def test_no_letter_ends_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of another encoding gets an escape for what it does not know."""
    for encoding, wanted in (("ascii", r"\xfc \u4e2d \ud800"), ("latin-1", "\u00fc \\u4e2d \\ud800")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
        monkeypatch.setattr(sys, "stdout", stream)
        say("\u00fc \u4e2d \ud800")
        assert stream.buffer.getvalue().decode(encoding) == wanted + "\n"  # type: ignore[attr-defined]


ERRORS: dict[str, Callable[[Path], list[str]]] = {
    "a file that is not there": lambda d: ["sft", "--data", str(d / f"{NAME}.jsonl"), "--out", str(d / "o")],
    "bad lines": lambda d: ["sft", "--data", str(write(d / "x.jsonl", [{ODD: ODD}])), "--out", str(d / "o")],
    "a stage": lambda d: [NAME],
    "a reward": lambda d: ["grpo", "--data", str(d / "d.jsonl"), "--reward", f"nowhere{NAME}:f", "--out", str(d / "o")],
    "a weight": lambda d: ["grpo", "--data", str(d / "d.jsonl"), "--reward", f"{NAME}@1.1.1", "--out", str(d / "o")],
    "a folder with a run": lambda d: ["report", str(d / NAME)],
    "a recipe": lambda d: ["pipeline", NAME],
    "a setting": lambda d: ["pipeline", "hh", "--set", NAME],
    "a config": lambda d: ["sft", "--config", str(d / NAME)],
    "a folder to resume": lambda d: ["resume", str(d / NAME)],
}
TYPED: dict[str, list[str]] = {
    "report": ["report", "a", "NAME"], "inspect": ["inspect", "a", "NAME"], "doctor": ["doctor", "NAME"],
    "pipeline": ["pipeline", "a", "NAME"],
    "a kind": ["inspect", "a", "--kind", "NAME"], "threads": ["sft", "--threads", "NAME"],
    "an option": ["sft", "--NAME", "1"], "a choice": ["sft", "--data", "x", "--precision", "NAME"],
}  # fmt: skip
NAME = "\x1b]0;mine\x07\x9b2J\u202e\r"


@pytest.mark.parametrize("about", ERRORS)
def test_errors_quote_texts_and_names_that_steer_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], about: str
) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / f"d.jsonl{NAME}").touch()
    write(tmp_path / "d.jsonl", [{"prompt": "a", "response": "b"}])
    assert cli.main(ERRORS[about](tmp_path)) == 2
    told = capsys.readouterr()
    assert r"\x1b]0;mine\x07" in clean(told.err)
    clean(told.out)


@pytest.mark.parametrize("about", TYPED)
def test_what_was_typed_steers_nothing_and_shows_no_secret(about: str, capsys: pytest.CaptureFixture[str]) -> None:
    for typed, shown in (
        (NAME, r"\x1b]0;mine\x07"),
        ("https://me:S3cretPw@host/?key=K3y", "https://me:***@host/?key=***"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main([word.replace("NAME", typed) for word in TYPED[about]])
        assert stopped.value.code == 2
        told = capsys.readouterr()
        assert shown in clean(COLOURS.sub("", told.err))
        assert not re.search("S3cret|K3y", told.out + told.err)


def test_what_transformers_says_about_a_model_steers_nothing(tmp_path: Path) -> None:
    """It quotes config.json, in its log and in warnings of Python."""
    small_policy().save(tmp_path / "m")
    change(tmp_path / "m" / "config.json", model_type="llama" + ODD)
    code = "import sys; from trainer.cli.program import main; sys.exit(main())"
    argv = [
        "sft",
        "--model",
        str(tmp_path / "m"),
        "--data",
        str(write(tmp_path / "d", [{"prompt": "a", "response": "b"}])),
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count(r"\x1b]0;mine\x07") >= 2
    clean(done.stderr)
    assert PLAIN in clean(console.warned(EVIL, UserWarning, "f.py", 1))


def test_facts_about_data_and_machine_steer_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of annotators, categories and fields; and what the environment says."""
    row = {"prompt": ODD, "chosen": "a", "rejected": "b", "category": ODD, "annotations": {ODD: "chosen", "x": "tie"}}
    path = write(tmp_path / f"d{NAME}.jsonl", [row] * 3 + [{ODD: 1}, {"prompt": "p", "chosen": ODD}])
    assert cli.main(["inspect", str(path), "--held-out", str(path)]) == 0
    assert r"\x1b" in clean(capsys.readouterr().out)
    machine = Machine({"x": EVIL}, {"eager": EVIL}, [EVIL], 1, None, 0.0, 1, 1.0, 1.0, 1.0, EVIL, 1.0, EVIL)
    say(screen(machine, [Advice(EVIL)]))
    assert r"\x1b" in clean(capsys.readouterr().out)


def test_notes_about_data_and_alarms_steer_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good: Record = {"prompt": "a", "response": "b"}
    data.read(write(tmp_path / "d.jsonl", [good] * 200 + [{ODD: ODD}]), "demonstrations")
    assert r"\x1b]0;mine\x07" in clean(capsys.readouterr().err)

    class Alarmed:
        alarms = ()

        def update(self, *_: Any) -> list[Alarm]:
            return [Alarm("n", 1, 1, EVIL)]

        def metrics(self) -> dict[str, float]:
            return {}

    watching = watch.Watch.__new__(watch.Watch)
    watching.cfg = type("C", (), {"on_alarm": "note"})()  # type: ignore[assignment]
    watching.update(1, {}, Alarmed(), KLController(0.1, None, 1.0), log.RunLog(tmp_path), EVIL)  # type: ignore[arg-type]
    assert clean(capsys.readouterr().out).count(PLAIN) == 2


def test_errors_of_rewards_steer_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An endpoint's words, and those of a function; and tracebacks, which quote them."""

    def fails(*_: Any) -> list[float]:
        raise NoAnswer(f"status 500: {EVIL}")

    def asked(*_: Any) -> int:
        _from_function(fails, "r", None, alone=False)(type("R", (), {"samples": []})(), [])  # type: ignore[arg-type]
        return 0

    monkeypatch.setattr("trainer.rewards.sources.responses_of", lambda *_: [])
    monkeypatch.setattr(cli, "_main", asked)
    assert cli.main([]) == 2
    assert PLAIN in clean(capsys.readouterr().err)
    try:
        asked()
    except ValueError as error:
        console.unforeseen(type(error), error, error.__traceback__)
    told = clean(capsys.readouterr().err)
    assert told.startswith("Traceback")
    assert PLAIN in told


def test_a_program_shows_tracebacks_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rlhf-train", "--version"])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(warnings, "formatwarning", formatted := warnings.formatwarning)
    assert cli.main(["--version"]) == 0
    assert (sys.excepthook, warnings.formatwarning) == (sys.__excepthook__, formatted)
    assert cli.main() == 0
    assert (sys.excepthook, warnings.formatwarning) == (console.unforeseen, console.warned)


@pytest.mark.parametrize("path", sorted((ROOT / "trainer").rglob("*.py")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_there_is_one_way_to_the_screen(path: Path) -> None:
    """Nothing prints, writes to a standard stream, or uses rich, but for the console."""
    if path.name == "console.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{path.name}:{node.lineno} prints"
        if isinstance(node, ast.Attribute) and node.attr == "write" and isinstance(node.value, ast.Attribute):
            assert node.value.attr not in ("stdout", "stderr"), f"{path.name}:{node.lineno} writes to a stream"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert not any(n.split(".")[0] == "rich" for n in names), f"{path.name}:{node.lineno} uses rich"


def test_the_log_keeps_what_the_screen_escapes(tmp_path: Path) -> None:
    run = log.RunLog(tmp_path, quiet=True)
    run.samples("t", [{"after": EVIL}])
    assert log.records(tmp_path / run_folder.SAMPLES)[0]["after"] == EVIL
    assert json.loads((tmp_path / run_folder.SAMPLES).read_bytes())["after"] == EVIL
