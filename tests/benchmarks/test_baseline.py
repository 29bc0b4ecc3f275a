"""A release that is slower or larger than the last one, named after its number in the design; and the PPO update."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rlhf_kernels as rk
from benchmarks.measure.memory import Allocations
from benchmarks.studies import check, update
from benchmarks.studies.check import Measured
from benchmarks.work import update as work
from benchmarks.work.update import LOSSES, SIZES, World

WAS = Measured(ratio=0.8, bytes=1_000_000)


@pytest.mark.parametrize(
    ("found", "worse"),
    [
        ([Measured(0.91, 1_009_000)], []),
        ([Measured(0.93, 1_000_000)], ["slower"]),
        ([Measured(0.93, 1_000_000), Measured(0.85, 1_000_000)], []),  # a noisy neighbour, gone at the second look
        ([Measured(0.80, 1_011_000)], ["larger"]),
        ([Measured(1.60, 2_000_000)], ["slower", "larger"]),
        ([Measured(0.40, 500_000)], []),
    ],
)
def test_pitfall_27_a_regression_is_caught(found: list[Measured], worse: list[str]) -> None:
    answers = iter(found)
    last = found[-1]
    (row,) = check.compare({"case": WAS}, ["case"], lambda name: next(answers, last))
    assert len(row.worse) == len(worse)
    for word, said in zip(worse, row.worse, strict=True):
        assert word in said
        assert said in check.shown([row])
    assert bool(row.better) == (last.ratio < 0.68)


def test_pitfall_27_the_command_compares_with_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"old": Measured(0.5, 100), "new": Measured(0.5, 100)}
    monkeypatch.setattr(check, "CASES", found)
    monkeypatch.setattr(check, "measure", lambda name, rounds: found[name])
    monkeypatch.setattr(check.torch, "set_num_threads", lambda n: None)
    flags = ["--baseline", str(tmp_path / "baseline.json")]
    assert check.main(flags) == 2
    assert "--write makes one" in capsys.readouterr().err
    assert check.main([*flags, "--write"]) == 0
    assert check.main(flags) == 0
    found["old"] = Measured(0.5, 102)
    assert check.main(flags) == 1
    assert "2.0% larger, 1% are allowed" in capsys.readouterr().out
    assert check.main([*flags, "--only", "new"]) == 0


def test_pitfall_27_the_committed_baseline_knows_every_case() -> None:
    _, baseline = check.read(check.BASELINE)
    assert baseline.keys() == check.CASES.keys()


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow if "bf16" in x else ()) for x in check.CASES])
def test_pitfall_27_memory_is_that_of_the_baseline(name: str) -> None:
    """Counted bytes depend on the backend, on what the CPU can do and on torch; speed is left to the command."""
    there, baseline = check.read(check.BASELINE)
    found = check.differences(there, check.here(there["threads"]))
    if found:
        pytest.skip("; ".join(found))
    now = check.peak(check.CASES[name]())
    assert now == pytest.approx(baseline[name].bytes, rel=check.LARGER)


def test_pitfall_27_the_gate_is_not_fooled_by_kept_pages() -> None:
    """The native backend hands memory from call to call; what is counted is what a call needs by itself."""
    head = torch.randn(64, 8, requires_grad=True), torch.randn(4096, 8, requires_grad=True), torch.arange(64)

    def counted(rows: int) -> int:
        with Allocations() as seen:
            rk.ppo_loss(*head, None, torch.ones(64), max_bytes=rows * 4 * 4096).loss.backward()
        return seen.peak

    small = counted(16)
    assert counted(64) > 2 * small
    assert counted(16) == small
    older = torch.empty(1000).untyped_storage()
    with Allocations() as seen:
        torch.empty(0).set_(older)
    assert seen.peak == 0


def test_pitfall_27_counted_bytes_are_the_same_every_time() -> None:
    world, peaks = World(SIZES["tiny"]), set()
    world.update(LOSSES["ours"])
    for _ in range(3):
        with Allocations() as seen:
            world.update(LOSSES["ours"])
        peaks.add(seen.peak)
    assert len(peaks) == 1


def test_the_benchmark_of_the_update_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--size", "tiny", "--rounds", "2", "--repeats", "0", "--out", str(tmp_path / "run.json")]
    update.main([*flags, "--threads", str(torch.get_num_threads())])
    run = json.loads((tmp_path / "run.json").read_text())
    assert max(run["parity"].values()) < update.PARITY
    assert {row["loss"] for row in run["times"]} == LOSSES.keys()
    for row in run["times"]:
        assert len(row["runs"]) == 2
        assert ("update_ratio" in row) == (row["loss"] in update.RIVALS)
    assert "| responses | " in capsys.readouterr().out


def test_the_benchmark_of_the_update_compares_like_with_like(monkeypatch: pytest.MonkeyPatch) -> None:
    def louder(world: World, part: object) -> rk.LossOutput:
        out = work.materialised(world, part)  # type: ignore[arg-type]
        return rk.LossOutput(1.01 * out.loss, out.metrics)

    monkeypatch.setitem(LOSSES, "materialised", louder)
    with pytest.raises(RuntimeError, match="the updates differ"):
        update.parity(World(SIZES["tiny"]))


@pytest.mark.slow
def test_the_update_needs_less_memory_than_one_with_all_logits() -> None:
    """At 8192 tokens: a fifth of what the loss causes, and in all 2.5 times less."""
    ours, theirs, none = (update.peak(x, "real", 1, live=True).total for x in ("ours", "materialised", "none"))
    assert theirs - none >= 5 * (ours - none)
    assert theirs >= 2.5 * ours
