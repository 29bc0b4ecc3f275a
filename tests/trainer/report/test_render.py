"""Templates: when Jinja is loaded, and that they are installed with the program."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from trainer.report.render import render

ROOT = Path(__file__).parents[3]
HELP = """
import sys
from trainer.cli import main
import trainer.cli.program
status = main(["--help"])
print(status, sorted({"jinja2", "markupsafe", "torch"} & set(sys.modules)))
"""


def test_help_does_not_wait_for_jinja() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_templates_are_installed_with_the_program() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    files = [path for path in (ROOT / "trainer" / "report" / "templates").iterdir() if path.is_file()]
    assert len(files) >= 4
    for path in files:
        assert any(fnmatch(f"templates/{path.name}", pattern) for pattern in patterns["trainer.report"]), path.name


def test_a_value_that_a_template_wants_and_nobody_gives_is_an_error() -> None:
    """A page with a hole in it would be taken for a run without results."""
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError, match="verdicts"):
        render("page.html.jinja", name="x", stages=[], lost=[], finished=True)
