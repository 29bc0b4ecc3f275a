"""The report: self-contained, complete where there is something to show, calm where there is not."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from trainer.report import page as report
from trainer.run.log import RunLog

VOID = {"meta", "br", "img", "input", "link"}


class Outline(HTMLParser):
    """Checks that tags nest, and collects attributes that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [str(v) for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parse(page: str) -> Outline:
    outline = Outline()
    outline.feed(page)
    assert outline.open in ([], ["html"])
    return outline


@pytest.fixture
def run(tmp_path):
    log = RunLog(tmp_path / "demo", quiet=True)
    for stage, drop in (("ppo", 0.0), ("ppo <no KL>", 1.0)):
        with log.start(stage, 30) as bar:
            for i in range(30):
                metrics = {
                    "objective/scores": i / 30, "objective/kl": i * (1 + drop), "policy/entropy_avg": 1 - i / 40,
                    "policy/clipfrac_avg": 0.1, "response/length": 8.0 - drop * i / 10, "extra": 3.0,
                }  # fmt: skip
                if i % 10 == 9:
                    rate = 0.5 + (0.5 - drop) * i / 60
                    metrics |= {"win_rate": rate, "win_rate_low": rate - 0.03, "win_rate_high": rate + 0.03}
                bar.step(metrics)
    log.samples("Before and after", [{"prompt": "<p>", "before": "a & b", "after": "c", "judge_after": 3.5}] * 10)
    log.summary(
        {
            "seed": 0,
            "verdicts": [
                {"title": "PPO wins", "text": "by far", "ok": True},
                {"title": "Reward hacking detected", "text": "at update 12", "ok": False},
            ],
            "sft": {"judge": {"value": 1.76, "low": 1.66, "high": 1.86}},
            "ppo": {"judge": {"value": 3.05, "low": 2.99, "high": 3.11}, "kl": 1.9},
            "reward_model": {"accuracy": 0.903, "accuracy_low": 0.89, "accuracy_high": 0.915},
        }
    )
    return tmp_path / "demo"


def test_a_whole_run(run):
    path = report.write(run)
    page = path.read_text(encoding="utf-8")
    outline = parse(page)
    assert path == run / "report.html"
    assert outline.loads == []
    assert "script" not in outline.tags
    assert not re.search(r"url\(|@import|https?://", page)
    for title in ("Reward", "Held-out win rate", "KL", "Entropy", "Clip fraction", "Length"):
        assert f"<figcaption><b>{title}</b>" in page
    assert page.count("ppo &lt;no KL&gt;</span>") >= 6
    assert '<polygon class="band"' in page
    assert 'class="verdict ok"' in page
    assert 'class="verdict alarm"' in page
    assert "Reward hacking detected" in page
    assert "prefers-color-scheme: dark" in page


def test_text_is_escaped_and_samples_stand_side_by_side(run):
    page = report.write(run).read_text(encoding="utf-8")
    assert "&lt;p&gt;" in page
    assert "<p>&lt;" not in page
    assert "a &amp; b</pre>" in page
    assert page.count("<article>") == 8
    assert "2 more in samples.jsonl" in page
    assert "<h4>after</h4><pre>c</pre><span class=chip>judge <b>3.5</b></span>" in page


def test_models_share_a_table_and_intervals_are_shown(run):
    page = report.write(run).read_text(encoding="utf-8")
    assert "<th>sft</th><th>ppo</th>" in page
    assert "<b>1.760</b> <span class=ci>[1.660, 1.860]</span>" in page
    assert "<b>0.903</b> <span class=ci>[0.890, 0.915]</span>" in page
    assert "accuracy low" not in page
    assert "<caption>Run</caption>" in page


@pytest.mark.parametrize("missing", ["metrics.jsonl", "summary.json", "samples.jsonl"])
def test_what_is_missing_is_left_out(run, missing):
    (run / missing).unlink()
    page = report.write(run).read_text(encoding="utf-8")
    parse(page)
    assert ("<h2>Training" in page) == (missing != "metrics.jsonl")
    assert ("<h2>Results" in page) == (missing != "summary.json")
    assert ("no summary yet" in page) == (missing == "summary.json")
    assert ("<h2>Samples" in page) == (missing != "samples.jsonl")


def test_a_log_cut_short_still_reports(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "sft", "step": 1, "loss": 2.0, "nan": null}\n{"stage": "s')
    page = report.write(tmp_path).read_text(encoding="utf-8")
    parse(page)
    assert "<figcaption><b>Loss</b>" in page


def test_folders_without_a_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        report.write(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        report.write(tmp_path / "nowhere")


BROKEN = [b"\xff\xfe", b"{", b"[1]", b'{"loss": ' + b"9" * 5000 + b"} x", b"[" * 100_000, b'{"loss": "\xe9"}']
ODD = [
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 400,
    "-" + "9" * 5000,
    "1e-320",
    "-1e308",
    "1e308",
    "true",
    "null",
    '"x"',
    "{}",
]


def test_a_log_that_somebody_changed_is_shown_as_far_as_it_goes(tmp_path):
    """Lines that are no objects are counted; numbers that none can draw are left out; the rest is there."""
    good = '{"stage": "sft", "step": %d, "loss": 2.5}\n'
    odd = "".join(f'{{"stage": "sft", "step": 3, "loss": {x}, "kl": {x}}}\n{{"step": {x}, "loss": 1}}\n' for x in ODD)
    whole = (good % 1).encode() + b"\n".join(BROKEN) + b"\n" + odd.encode() + (good % 9).encode() + b'{"stage": "s'
    (tmp_path / "metrics.jsonl").write_bytes(whole)
    page = report.write(tmp_path).read_text(encoding="utf-8")
    parse(page)
    assert f"metrics.jsonl: {len(BROKEN)} lines are left out, the first is line 2 (" in page
    assert "sft, step 1: 2.5<" in page
    assert "sft, step 9: 2.5<" in page
    assert "nan" not in page
    assert "inf" not in page.replace("infer", "")
    (tmp_path / "metrics.jsonl").write_bytes((good % 1).encode() * 3 + b"half a li")
    assert "left out" not in report.write(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("odd", ODD)
def test_a_summary_may_hold_any_number(tmp_path, odd):
    (tmp_path / "summary.json").write_text(
        f'{{"a": {odd}, "b": {{"value": {odd}, "low": {odd}, "high": 1}}, "verdicts": {odd}, '
        f'"c": {{"x": {odd}, "x_low": 0, "x_high": {odd}}}, "d": {{"e": {{"f": {odd}}}}}}}'
    )
    parse(report.write(tmp_path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("broken", BROKEN)
def test_a_summary_that_is_none_costs_one_line(tmp_path, broken):
    (tmp_path / "summary.json").write_bytes(broken)
    with pytest.raises(ValueError, match=r"summary\.json is no summary: ") as error:
        report.write(tmp_path)
    assert "\n" not in str(error.value)


def test_whatever_a_text_holds_the_page_loads_and_runs_nothing(tmp_path):
    """Texts wherever one can be somebody's: stages, metrics, titles, samples, verdicts, alarms, configuration."""
    evil = "<script>x</script><img src=x onerror=y>\"'><a href=http://z>&lt;</pre></title><link href=q>"
    log = RunLog(tmp_path / "run", quiet=True)
    with log.start(evil, 1) as bar:
        bar.step({evil: 1.0, "loss": 1.0})
    log.samples(evil, [{"prompt": evil, evil: evil, f"{evil}_score": 1.0}])
    log.summary({"verdicts": [{"title": evil, "text": evil, "ok": evil}], evil: evil, "s": {evil: {evil: evil}}})
    (tmp_path / "run" / "alarms.jsonl").write_text(
        json.dumps(dict.fromkeys(["stage", "step", "name", "message"], evil))
    )
    (tmp_path / "run" / "resolved.yaml").write_text(evil)
    page = report.write(tmp_path / "run").read_text(encoding="utf-8")
    plain = parse(report.write(run_without(tmp_path / "plain")).read_text(encoding="utf-8"))
    found = parse(page)
    assert found.loads == []
    assert not {"script", "img", "a", "link"} & {*found.tags}
    assert {*found.tags} >= {*plain.tags} - {"script"}
    assert page.count("&lt;script&gt;") > 10


def run_without(folder):
    log = RunLog(folder, quiet=True)
    log.samples("t", [{"prompt": "p", "after": "a"}])
    return folder


def test_the_page_takes_the_place_of_a_link_and_does_not_follow_it(tmp_path):
    """A run folder that came from others may hold links to files of ours."""
    (mine := tmp_path / "mine").write_text("precious")
    folder = run_without(tmp_path / "theirs")
    (folder / "resolved.yaml").write_text("# rlhf_kernels 0.1.0\nstage: sft\n")
    for name in ("report.html", "report.html.saving"):
        (folder / name).symlink_to(mine)
    report.write(folder)
    assert mine.read_text() == "precious"
    assert "<article>" in (folder / "report.html").read_text(encoding="utf-8")
