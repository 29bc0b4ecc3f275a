"""Texts of others are shown as they are: neither HTML nor a template, wherever on the page they stand."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from trainer.report import page
from trainer.report.tables import tables
from trainer.run.log import RunLog

TEMPLATES = Path(page.__file__).parent / "templates"
HOSTILE = [
    "</script><script>alert(1)</script>",
    "</style></title></pre></body>",
    "\" onload=\"x' onerror='y",
    "{{ 7*7 }}",
    "{{ name.upper() }}{{ nothing.here }}",
    "{% raw %}",
    "{% endraw %}{% include 'style.css' %}",
    "{%- for x in 'ab' -%}{{ x }}{%- endfor -%}",
    "{# not a comment",
    "# for line statements\n## for comments",
    "&lt;b&gt; &amp;#39;",
    "<!-- no end",
    "\ud800 half a pair",
]


class Seen(HTMLParser):
    """The tags of a page with the names of their attributes, and its texts as a reader sees them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, ...]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *(name for name, _ in attrs)))
        self.texts += [value for name, value in attrs if name == "aria-label"]

    def handle_data(self, data):
        self.texts.append(data)


def report(folder: Path, text: str) -> Seen:
    """Of a run in which this text stands wherever one can be somebody's."""
    log = RunLog(folder, quiet=True)
    with log.start(text, 2) as bar:
        bar.step({"loss": 1.0, text: 2.0})
        bar.step({"loss": 1.0, text: 3.0})
    log.samples(text, [{"prompt": text, "after": text, text: text, f"{text}_score": 1.0}] * 9)
    log.summary(
        {
            "verdicts": [{"title": text, "text": text, "ok": True}],
            "note": text,
            text: 1.0,
            "sft": {text: text, "win_rate": {"value": 0.5, "half": 0.1}},
            "arms": {text: {"x": 1.0}, "other": {"x": 2.0}},
        }
    )
    alarm = dict.fromkeys(("stage", "step", "since", "name", "message"), text)
    (folder / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    (folder / "resolved.yaml").write_bytes(text.encode(errors="backslashreplace"))
    return Seen(page.write(folder).read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_is_shown_as_it_is_and_changes_nothing_else(tmp_path: Path, text: str) -> None:
    """Tags and attributes are those of a harmless page, and the text stands wherever the harmless word does."""
    harmless, found = report(tmp_path / "one", "harmless"), report(tmp_path / "other", text)
    assert found.tags == harmless.tags
    shown = text.encode(errors="backslashreplace").decode()
    times = "".join(harmless.texts).count("harmless")
    assert times > 50
    assert "".join(found.texts).count(shown) == times
    assert "49" not in "".join(found.texts)


@pytest.mark.parametrize("name", ["{{ 7*7 }}", "{% raw %}", "a\"b'c", "<i>&amp;"])
def test_so_is_the_name_of_the_folder(tmp_path: Path, name: str) -> None:
    (folder := tmp_path / name).mkdir()
    (folder / "summary.json").write_text('{"a": 1}')
    written = page.write(folder)
    assert Seen(written.read_text(encoding="utf-8")).texts.count(name) == 2
    assert page.HEAD in written.read_text(encoding="utf-8")
    page.write(folder)  # It is known for one of ours.


def test_names_of_methods_are_names_like_others(tmp_path: Path) -> None:
    """In a template, `x.items` is a method of a dictionary or the key of that name: no data goes in as a dictionary."""
    names = ["items", "keys", "values", "get", "pop", "count", "index", "title", "name", "rows", "cells", "__class__"]
    log = RunLog(tmp_path, quiet=True)
    log.samples("t", [{"prompt": "p"} | {name: f"said by {name}" for name in names if name != "title"}])
    log.summary({name: f"value of {name}" for name in names} | {"arms": {name: {name: 1.5} for name in names}})
    texts = Seen(page.write(tmp_path).read_text(encoding="utf-8")).texts
    for name in names:
        assert texts.count(f"value of {name}") == 1
        assert texts.count(f"said by {name}") == (name != "title")
        assert texts.count(name.replace("_", " ")) >= 3
    assert texts.count("1.500") == len(names)


def test_only_what_we_have_drawn_is_taken_for_html() -> None:
    templates = "".join(path.read_text(encoding="utf-8") for path in TEMPLATES.glob("*.jinja"))
    assert set(re.findall(r"\{\{ *([\w.]+) *\| *safe *\}\}", templates)) == {"tables", "figure.svg"}
    assert len(re.findall(r"\bsafe\b", templates)) == 2
    assert "autoescape" not in templates
    assert tables({"<i>": "<b>"}).count("&lt;") == 2
