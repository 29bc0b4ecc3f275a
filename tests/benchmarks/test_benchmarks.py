"""The benchmark measures what it says: batches like the work, a judge that is right, and a gate that shuts."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.contenders.base import Contender
from benchmarks.contenders.roster import contenders
from benchmarks.measure.alone import extra_bytes
from benchmarks.measure.turns import table
from benchmarks.report import tables
from benchmarks.studies.compare import compare
from benchmarks.work.cases import DTYPES, HEAD_OPS, SHAPES, Batch, Shape, draw, for_op
from benchmarks.work.judge import judge_for, verdict
from benchmarks.work.objectives import LOSSES, weighted
from benchmarks.work.truth import Result

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base():
    return draw(SHAPES["tiny"], DTYPES["fp32"])


def test_the_command_measures_every_op_and_we_pass_its_gate(tmp_path):
    out = tmp_path / "run.json"
    command = f"-m benchmarks compare --shape tiny --seconds 0.02 --threads 1 --skip compile --skip TRL --out {out}"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    run = json.loads(out.read_text())
    rows = run["rows"]
    assert {row["op"] for row in rows} == {*HEAD_OPS, "gae"}
    assert {row["dtype"] for row in rows if row["op"] in HEAD_OPS} == set(DTYPES)
    ours = [row for row in rows if row["side"] == "ours"]
    assert len(ours) == 2 * (len(HEAD_OPS) + 2) + 1
    for row in ours:
        assert row["verdict"] == "ok", row
        assert row["errors"]
        assert row["rounds"] >= 2
        assert row["fastest_peer"]
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
    # the odds of a reply that is all but certain are more than bfloat16 can tell from infinity
    certain = [row for row in rows if (row["op"], row["dtype"], row["side"]) == ("orpo", "bf16", "peer")]
    assert [row for row in rows if not row["verdict"].startswith(("ok", "skipped: ")) and row not in certain] == []
    for row in rows:
        if row["side"] == "floor":
            assert row["to_floor"] == 1
    assert run["environment"]["threads"] == 1
    assert run["environment"]["max_bytes"] > 0
    assert "avx512_bf16" in run["environment"]["cpu_flags"]
    if run["environment"]["backends"]["native"] == "ok":
        assert run["environment"]["isa"] == importlib.import_module("rlhf_kernels._C").isa()
        assert f"native on {run['environment']['isa']}" in done.stdout
    assert run["environment"]["cpu_model"] in done.stdout
    assert "| **rk.ppo_loss** |" in done.stdout


@pytest.mark.parametrize("op", HEAD_OPS)
def test_the_judge_agrees_with_autograd_over_float64_logits(base, op):
    batch, ref_truth = for_op(op, *base)
    hidden, weight = batch.hidden.double().requires_grad_(), batch.weight.double().requires_grad_()
    logp_all = (hidden @ weight.t()).log_softmax(-1)
    logp = logp_all.gather(-1, batch.targets[:, None]).squeeze(1)
    entropy = -(logp_all.exp() * logp_all).sum(-1)
    exact = Result(logp=logp.detach(), entropy=entropy.detach())
    names = ["logp", "entropy"]
    if batch.ref_hidden is not None:
        ref_all = (batch.ref_hidden.double() @ batch.ref_weight.double().t()).log_softmax(-1)
    if op in LOSSES or op == "kl":
        ref_logp = None
        if batch.ref_hidden is not None:
            ref_logp = ref_all.gather(-1, batch.targets[:, None]).squeeze(1)
        kl = (logp_all.exp() * (logp_all - ref_all)).sum(-1) if op == "kl" else None
        loss = LOSSES[op](logp, ref_logp, batch) if kl is None else kl[batch.kept].mean()
        exact = Result(loss.detach(), *exact[1:3], *torch.autograd.grad(loss, (hidden, weight)), kl=kl)
        names += ["grad_hidden", "grad_weight"] + ["kl"] * (op == "kl")
    if op == "logits":  # these are rounded to float32, and are what counts
        logits = batch.logits.double().requires_grad_()
        logp_all = logits.log_softmax(-1)
        logp = logp_all.gather(-1, batch.targets[:, None]).squeeze(1)
        loss = weighted(logp, None, batch)
        exact = Result(loss.detach(), logp, -(logp_all.exp() * logp_all).sum(-1))
        exact = exact._replace(grad_logits=torch.autograd.grad(loss, logits)[0])
        names.append("grad_logits")
    errors, found = judge_for(op, batch, base[1], ref_truth)[0](exact)
    first = {name: "" if name.startswith("grad") else "_mean" for name in names}
    wanted = {name + end for name in names for end in (first[name], "_max", "_scale")}
    assert set(errors) == wanted | ({"loss"} if op != "score" else set())
    assert max(errors.values()) < 1e-10
    assert found == "ok"


def _cheat(batch, truth, change):
    """A contender that knows the answer and returns it, changed, at once."""
    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
    logp = (hidden @ weight.t()).log_softmax(-1).gather(-1, batch.targets[:, None]).squeeze(1)
    loss = LOSSES["train"](logp, None, batch)
    right = Result(loss.detach(), logp.detach(), None, *torch.autograd.grad(loss, (hidden, weight)))
    wrong = change(right)
    return Contender("cheat", "peer", lambda _: lambda: wrong)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("loss", lambda r: r._replace(loss=r.loss + 0.01)),
        (
            "logp_max",
            lambda r: r._replace(logp=r.logp + torch.nn.functional.one_hot(torch.tensor(5), len(r.logp)) / 100),
        ),
        ("logp_max", lambda r: r._replace(logp=r.logp * float("nan"))),
        ("grad_hidden", lambda r: r._replace(grad_hidden=1.01 * r.grad_hidden)),
        ("grad_weight", lambda r: r._replace(grad_weight=torch.zeros_like(r.grad_weight))),
    ],
)
def test_a_wrong_contender_is_marked_and_is_nobodys_rival(base, name, change):
    batch, _ = for_op("train", *base)
    honest = [c for c in contenders("train") if c.name in ("torch, materialised", "rk.fused_loss")]
    rows = compare("train", batch, base[1], None, [_cheat(*base, change), *honest], seconds=0, rounds=3)
    cheat, peer, ours = ({**row, "op": "train", "shape": "tiny", "dtype": "fp32"} for row in rows)
    assert cheat["verdict"].startswith("wrong: ")
    assert name in cheat["verdict"]
    assert peer["verdict"] == ours["verdict"] == "ok"
    assert cheat["median_s"] < peer["median_s"]
    assert ours["fastest_peer"] == peer["contender"]
    assert cheat["verdict"] in tables.markdown([cheat, peer, ours])


def test_the_same_cheat_untouched_passes(base):
    batch, _ = for_op("train", *base)
    (row,) = compare("train", batch, base[1], None, [_cheat(*base, lambda r: r)], seconds=0, rounds=1)
    assert row["verdict"] == "ok"


def test_rounding_of_logits_is_allowed_in_bfloat16_only():
    errors = {"logp_max": 0.1, "grad_hidden": 0.05}
    assert verdict(errors, torch.bfloat16, 40.0) == "ok"
    assert verdict(errors, torch.float32, 40.0) == "wrong: logp_max, grad_hidden"


def test_who_is_not_there_or_fails_is_named_and_the_others_go_on():
    def absent(_):
        raise ImportError("No module named 'somebody'")

    def broken(_):
        def step():
            raise RuntimeError("no such kernel\nand a traceback")

        return step

    field = [
        Contender("absent", "peer", absent),
        Contender("broken", "peer", broken),
        Contender("there", "ours", lambda _: lambda: 1),
    ]
    rows = table(field, None, lambda _: ({}, "ok"), seconds=0, rounds=2)
    assert [row["verdict"] for row in rows] == [
        "skipped: ImportError: No module named 'somebody'",
        "failed: RuntimeError: no such kernel",
        "ok",
    ]
    assert rows[2]["rounds"] == 2
    assert "fastest_peer" not in rows[2]


def test_batches_look_like_the_work(base):
    batch, truth = base
    assert truth.entropy.mean() == pytest.approx(0.5, abs=0.05)
    assert truth.entropy.quantile(0.25) < 0.1  # all but certain
    assert truth.entropy.max() > 1.5  # wide open
    assert truth.largest_logit < 50
    grpo, _ = for_op("grpo", batch, truth)
    log_ratio = truth.logp.float() - grpo.old_logp
    assert 0.05 < ((log_ratio > 0.3) | (log_ratio < -0.3)).float().mean() < 0.4
    edges = torch.tensor([0.8, 1.2]).log()
    assert (log_ratio[:, None] - edges).abs().min() > 0.1
    sparse, _ = for_op("sparse", batch, truth)
    assert sparse.kept.float().mean() == 0.5
    assert (sparse.advantages[sparse.kept] == 0).float().mean() == pytest.approx(0.3, abs=0.03)
    assert judge_for("sparse", sparse, truth, None)[1] == pytest.approx(0.3, abs=0.03)


def test_memory_tells_materialised_logits_from_a_byte_budget(tmp_path):
    shape = Shape(tokens=512, hidden=16, vocab=20000)
    batch, _ = for_op("train", *draw(shape, DTYPES["fp32"]))
    path, logits = str(tmp_path / "batch.pt"), 4 * shape.tokens * shape.vocab
    try:
        open("/proc/self/clear_refs", "a").close()
    except OSError:
        pytest.skip("peak memory is read from /proc")
    batch.save(path)
    saved = partial(Batch.load, path)
    assert extra_bytes(saved, "train", "torch, materialised", 1) > 2 * logits
    assert extra_bytes(saved, "train", "rk.fused_loss", 1, max_bytes=2**22) < logits / 3
