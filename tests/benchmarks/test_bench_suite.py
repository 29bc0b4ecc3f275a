"""What surrounds the measurements: text, shapes, figures, the memory curve, and pytest's own table."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from benchmarks.contenders import base
from benchmarks.contenders.roster import contenders
from benchmarks.measure.turns import ranked
from benchmarks.report import environment, figures, tables
from benchmarks.studies import memory as memory_curve
from benchmarks.work import text
from benchmarks.work.cases import DTYPES, HEAD_OPS, MODELS, UNIFORM, Batch, Shape, draw, for_op, shape_of
from benchmarks.work.judge import judge_for
from rlhf_kernels.engine.call import MAX_BYTES, MAX_BYTES_GPU

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("nats", [0.3, 1.0, 2.5, UNIFORM])
def test_mean_entropy_is_what_was_asked_for(nats):
    shape = Shape(128, 64, 2000)
    _, truth = draw(shape, DTYPES["fp32"], nats)
    wanted = torch.tensor(2000.0).log().item() if nats == UNIFORM else nats
    assert truth.entropy.mean() == pytest.approx(wanted, rel=0.1)


def test_models_have_ragged_sequences_that_hold_all_tokens():
    for name, (hidden, vocab) in MODELS.items():
        shape = shape_of(name, 4096)
        lengths = shape.lengths()
        assert (shape.hidden, shape.vocab, int(lengths.sum())) == (hidden, vocab, 4096)
        assert lengths.min() > 0
        assert len(lengths.unique()) > 4


def test_prompts_of_ragged_pairs_are_as_long_as_their_neighbours():
    batch, _ = for_op("dpo_prompts", *draw(Shape(400, 16, 100, ragged=True), DTYPES["fp32"]))
    starts, ends = batch.cu_seqlens[:-1], batch.cu_seqlens[1:]
    prompts = [int((~batch.kept[a:b]).sum()) for a, b in zip(starts, ends, strict=True)]
    assert prompts[0::2] == prompts[1::2]
    assert all(batch.kept[b - 1] for b in ends)
    assert len(set(prompts)) > 2


def test_every_second_group_has_no_advantage():
    batch, _ = for_op("grpo_groups", *draw(Shape(400, 16, 100, ragged=True), DTYPES["fp32"]))
    per_sequence = batch.advantages[batch.cu_seqlens[:-1]]
    assert (per_sequence[:4] != 0).all()
    assert (per_sequence[4:] == 0).all()


def _corpus(path, lines):
    with gzip.open(path, "wt") as file:
        file.write("\n".join(lines))
    return path


def test_logits_of_a_model_trained_on_text(tmp_path):
    records = [
        {"question": f"How many are {i} and {i} ?", "answer": f"{i} and {i} are {2 * i}", "n": i} for i in range(60)
    ]
    path = _corpus(tmp_path / "sums.jsonl.gz", map(json.dumps, records))
    batch, truth = text.batch_of(path, torch.float32, tokens=64, steps=12)
    assert batch.hidden.shape == (64, text.HIDDEN)
    assert batch.weight.shape == (64, text.HIDDEN)  # whole rows of words and digits
    assert (batch.cu_seqlens.numel() - 1) % 2 == 0
    assert truth.entropy.mean() < 0.8 * torch.tensor(64.0).log()  # it has learned something
    assert truth.logp.mean() > -0.8 * torch.tensor(64.0).log()
    text.trained.cache_clear()
    again, _ = text.batch_of(path, torch.float32, tokens=64, steps=12)
    assert torch.equal(again.hidden, batch.hidden)
    judge, _ = judge_for("train", batch, truth, None)
    assert judge(contenders("train")[-1].build(batch)())[1] == "ok"


def test_text_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"line 2 of .*bad\.jsonl\.gz is no JSON"):
        list(text.documents(_corpus(tmp_path / "bad.jsonl.gz", ['{"a": "b"}', "{"])))
    with pytest.raises(ValueError, match="no record with a string"):
        list(text.documents(_corpus(tmp_path / "numbers.jsonl.gz", ['{"a": 1}'])))


def _row(contender, side, seconds, **more):
    times = {"median_s": seconds, "min_s": seconds, "max_s": seconds, "rounds": 3, "verdict": "ok"}
    return {"contender": contender, "side": side, "op": "train", "shape": "8x4x2", "dtype": "bf16"} | times | more


def test_figures_show_who_was_right_and_nobody_else():
    errors = {"errors": {"logp_max": 1e-3}, "to_floor": 2.0}
    rows = [
        _row("bare GEMM, 3 products", "floor", 0.1, to_floor=1.0),
        _row("rk.token_stats", "ours", 0.2, **errors),
        _row("TRL ChunkedLogProbFunction", "peer", 0.3, **errors),
        _row("Liger scaled cross-entropy", "peer", 0.01, **errors | {"verdict": "wrong: loss"}),
    ]
    rows += [_row("rk.token_stats", "ours", 0.2 + nats, nats=nats, **errors) for nats in (0.3, 1.0)]
    rows += [
        {"op": "memory", "contender": "rk.fused_loss", "side": "ours", "tokens": n, "dtype": "fp32", "head": "4x2",
         "shape": f"{n}x4x2", "verdict": "ok", "extra_bytes": 100 * n} for n in (10, 100)
    ]  # fmt: skip
    drawn = figures.of(rows)
    assert set(drawn) == {"time", "error", "entropy", "memory"}
    for svg in drawn.values():
        words = {node.text for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}
        assert "ours" in words
        assert "Liger" not in words
    assert "TRL" in drawn["time"]
    assert drawn["time"].count("<circle") == 2 + 2  # the points and the legend
    assert figures.of([_row("rk.token_stats", "ours", 0.2, verdict="wrong: loss", **errors)]) == {}


def test_a_table_names_who_is_not_here_under_it():
    rows = [_row("rk.token_stats", "ours", 0.2, forward_s=0.05, backward_s=0.15, to_floor=2.0, to_peer=0.5)]
    rows.append({**_row("quack", "peer", 1.0), "verdict": "skipped: No module named 'quack'"})
    shown = tables.markdown(rows)
    assert "| **rk.token_stats** | 200 (200–200) | 50 + 150 | 50% | 2.00 | 0.50 |" in shown
    assert "Not here: quack (No module named 'quack')." in shown


def test_parts_of_a_step_are_told_apart():
    rows = [{"contender": "a", "side": "ours", "verdict": "ok"}, {"contender": "b", "side": "peer", "verdict": "ok"}]
    a, b = ranked(rows, {"a": [(3.0, 1.0), (5.0, 2.0), (4.0, 1.5)], "b": [(8.0, None), (8.0, None), (8.0, None)]})
    assert (a["median_s"], a["forward_s"], a["backward_s"], a["to_peer"]) == (4.0, 1.5, 2.5, 0.5)
    assert "forward_s" not in b


def test_the_memory_curve_tells_who_grows(tmp_path):
    try:
        open("/proc/self/clear_refs", "a").close()
    except OSError:
        pytest.skip("peak memory is read from /proc")
    skipped = ["TRL", "Liger", "verl", "CCE", "linear_cross_entropy", "token_stats"]
    rows = {(r["contender"], r["tokens"]): r for r in memory_curve.curve([1024, 4096], 1, skipped, 60.0)}
    all_logits = rows["torch, materialised", 4096]["extra_bytes"]
    assert all_logits > 2 * 4 * 4096 * memory_curve.VOCAB
    assert all_logits > 2.5 * rows["torch, materialised", 1024]["extra_bytes"]
    assert rows["rk.fused_loss", 4096]["verdict"] == "ok"


def test_the_environment_of_a_gpu_has_its_name_and_budget(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100")
    for device in ("cuda", "cuda:0"):
        found = environment.environment(1, device=device)
        assert (found["device"], found["max_bytes"]) == ("NVIDIA H100", MAX_BYTES_GPU)
        assert "NVIDIA H100" in tables.heading(found)
    assert environment.environment(1)["max_bytes"] == MAX_BYTES["cpu"]


def test_pytest_collects_the_grid_and_prints_one_table(tmp_path):
    out = tmp_path / "rows.json"
    command = ["-m", "pytest", "benchmarks/", "--benchmark-only", "-q", "-p", "no:cacheprovider", "-k"]
    chosen = "sft-fp32 and (rk or GEMM or (torch and not compile) or quack)"
    # a worker of xdist tells its children that they are workers too, and those do not measure
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *command, chosen, "--table-out", str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| **rk.sft_loss** |" in done.stdout
    assert "quack" in done.stdout.split("Not here: ")[1].splitlines()[0]
    rows = {row["contender"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["rk.sft_loss"]["extra_bytes"] > 0
    assert rows["rk.sft_loss"]["fastest_peer"].startswith("torch")
    assert rows["rk.sft_loss"]["to_floor"] > 0
    assert rows["torch, materialised"]["backward_s"] > 0


def test_a_summary_names_the_file_of_every_line():
    rows = [
        _row("bare GEMM, 3 products", "floor", 0.1, to_floor=1.0),
        _row("rk.token_stats", "ours", 0.2, to_peer=0.5, fastest_peer="TRL", errors={"logp_max": 1e-6}),
        _row("rk.token_stats, 1 GiB", "ours", 0.1, to_peer=0.25, fastest_peer="TRL"),
        _row("TRL", "peer", 0.4, errors={"logp_max": 1e-2}),
        _row("Liger", "peer", 0.05, verdict="wrong: loss"),
    ]
    (shown,) = tables.summary([("run.json", rows)]).splitlines()[2:]
    wanted = "| 8x4x2 | bf16 | policy gradient, all rows | **200** | 100 | 400 (TRL) | **0.50** |  | 1e-06 | 1e-02 |"
    assert shown == f"{wanted} `run.json` |"


def test_every_result_that_documents_name_is_there():
    there = {path.name for path in (ROOT / "benchmarks" / "results").iterdir()}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"\b(?:cpu|gpu)-[\w.-]+?\.json", page.read_text())}
    assert named - there == set()


@pytest.mark.parametrize("op", [op for op in HEAD_OPS if op != "score"])
def test_nothing_is_left_on_the_cpu_when_a_batch_is_elsewhere(op, monkeypatch):
    """Tensors without data stand for those of a GPU: torch refuses to mix them with others."""
    batch, _ = for_op(op, *draw(Shape(64, 32, 100, ragged=True), DTYPES["fp32"]))
    rows, segments = base.kept_rows(batch, op).to("meta"), batch.segments.to("meta")
    there = {name: None if x is None else x.to("meta") for name, x in vars(batch).items()}
    monkeypatch.setattr(Batch, "segments", segments)
    for module in ("roster", "base"):
        monkeypatch.setattr(f"benchmarks.contenders.{module}.kept_rows", lambda batch, op: rows)
    (contender,) = [c for c in contenders(op) if c.name == "torch, materialised"]
    result = contender.build(Batch(**there))()
    gradients = (result.grad_logits,) if op == "logits" else (result.grad_hidden, result.grad_weight)
    assert [x.device.type for x in (result.loss, *gradients)] == ["meta"] * (1 + len(gradients))
