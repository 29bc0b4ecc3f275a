"""How many threads there are is settled before torch is imported."""

from __future__ import annotations

import pytest

pytest.importorskip("tyro")

from tests.trainer.cli.test_help import python


@pytest.mark.parametrize(
    ("argv", "omp", "expected"),
    [
        ([], None, "1"),
        ([], "3", "3"),
        (["--threads", "2"], "3", "2"),
        (["--model", "some/model"], None, "None"),
        (["--model=tiny"], None, "1"),
    ],
)
def test_threads_are_set_before_torch(tmp_path, argv, omp, expected):
    (tmp_path / "stage_probe.py").write_text(
        "import os, sys\n"
        "assert 'torch' not in sys.modules\n"
        "print(os.environ.get('OMP_NUM_THREADS'), os.environ['GOMP_SPINCOUNT'])\n"
        "raise SystemExit\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from trainer.cli import program as cli\n"
        "cli.STAGES['toy'] = cli.Stage('stage_probe', 'Config', 'run', '')\n"
        f"cli.main(['toy', *{argv!r}])"
    )
    done = python(code, OMP_NUM_THREADS=omp, GOMP_SPINCOUNT=None)
    assert done.stdout.split() == [expected, "1000"], done.stderr
