"""Which GPU results still belong to the kernels as they are. Says it in the log, and fails nobody for lack of a GPU."""

from __future__ import annotations

import json

from benchmarks.report import kernel_hash


def test_what_no_gpu_has_run_as_it_is_now(record_property):
    now, then = kernel_hash.hashes(), kernel_hash.measured()
    said = kernel_hash.report(now, then).splitlines()
    stale = [line for line in said if "measured on a GPU as it is now" not in line]
    record_property("table", f"{len(stale)} of {len(now)} kernel sources differ from what a GPU was measured with")
    assert len(now) > 10


def test_a_changed_source_is_named(tmp_path):
    kernels = tmp_path / "rlhf_kernels" / "backends" / "triton"
    kernels.mkdir(parents=True)
    (kernels / "head.py").write_text("a = 1\n")
    (kernels / "rows.py").write_text("b = 1\n")
    before = kernel_hash.hashes(tmp_path)
    results = tmp_path / "results"
    results.mkdir()
    (results / "gpu-head.json").write_text(json.dumps({"sources": before}))
    (results / "cpu-other.json").write_text("no JSON, and nobody's business")
    assert "as it is now" in kernel_hash.report(before, kernel_hash.measured(results))
    (kernels / "head.py").write_text("a = 2\n")
    (kernels / "new.py").write_text("c = 1\n")
    said = kernel_hash.report(kernel_hash.hashes(tmp_path), kernel_hash.measured(results)).splitlines()
    assert [line.split(" on a GPU")[0] for line in said] == [
        "rlhf_kernels/backends/triton/head.py: changed since it was last measured",
        "rlhf_kernels/backends/triton/new.py: never measured",
    ]
