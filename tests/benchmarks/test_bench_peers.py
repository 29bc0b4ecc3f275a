"""Adapters of peers: whom they find, what they call, and that a wrong one is marked, whoever it is.

Stand-ins with the signatures of the peers' own functions prove the adapters where no peer is installed; where one is,
it is called itself.
"""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.contenders import base, gae, liger, loading, plain_torch
from benchmarks.contenders.roster import contenders
from benchmarks.studies.compare import compare
from benchmarks.work import replies
from benchmarks.work.cases import DTYPES, Shape, draw, for_op
from benchmarks.work.judge import judge_for

SHAPE = Shape(256, 32, 500, ragged=True)
PEER_OPS = [
    (op, dtype) for op in ("train", "ipo", "kto", "orpo", "sft", "kl", "grpo_groups", "logits") for dtype in DTYPES
]


@pytest.fixture(scope="module")
def prepared():
    """(op, dtype) -> batch and judge."""
    bases, found = {}, {}

    def prepare(op, dtype="fp32"):
        if dtype not in bases:
            bases[dtype] = draw(SHAPE, DTYPES[dtype])
        if (op, dtype) not in found:
            batch, ref_truth = for_op(op, *bases[dtype])
            found[op, dtype] = batch, judge_for(op, batch, bases[dtype][1], ref_truth)[0]
        return found[op, dtype]

    return prepare


@pytest.mark.parametrize(("op", "dtype"), PEER_OPS)
def test_every_contender_that_is_here_agrees_with_float64(prepared, op, dtype):
    batch, judge = prepared(op, dtype)
    agreed = set()
    for contender in contenders(op):
        if contender.compiles or contender.side == "floor":
            continue
        try:
            step = contender.build(batch)
        except (ImportError, base.Skipped):
            continue
        errors, verdict = judge(step())
        assert verdict == "ok", (contender.name, errors)
        agreed.add(contender.side)
    assert agreed == {"ours", "peer"}


def _logps(change):
    return lambda hidden, weight, targets: change(plain_torch.logp_of(hidden, weight, targets))


MUTANTS = {
    "log-probabilities scaled": ("train", _logps(lambda x: 1.01 * x), "logp"),
    "log-probabilities moved": ("train", _logps(lambda x: x + 0.01), "logp"),
    "gradient scaled": ("train", _logps(lambda x: 1.01 * x - 0.01 * x.detach()), "grad"),
    "temperature": ("train", lambda h, w, y: plain_torch.logp_of(0.98 * h, w, y), "logp"),
    "targets shifted": ("train", lambda h, w, y: plain_torch.logp_of(h, w, y.roll(1)), "logp"),
    "the head's gradient halved": ("sparse", lambda h, w, y: plain_torch.logp_of(h, (w + w.detach()) / 2, y), "weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutated_log_probability_is_wrong(prepared, name):
    op, wrong, where = MUTANTS[name]
    batch, judge = prepared(op)
    errors, verdict = judge(_through_the_adapter(op, wrong, batch))
    assert verdict.startswith("wrong: "), errors
    assert where in verdict
    assert judge(_through_the_adapter(op, plain_torch.logp_of, batch))[1] == "ok"


def _through_the_adapter(op, logp_of, batch):
    from benchmarks.contenders.roster import _training

    return _training(op, base.LogpPeer("mutant", lambda: logp_of)).build(batch)()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_per_cent_is_seen_through_the_noise_of_bfloat16(prepared, dtype):
    batch, judge = prepared("train", dtype)
    assert judge(_through_the_adapter("train", plain_torch.logp_of, batch))[1] == "ok"
    errors, verdict = judge(_through_the_adapter("train", _logps(lambda x: 1.02 * x), batch))
    assert "logp_scale" in verdict, errors


def test_a_forgotten_mask_is_wrong(prepared, monkeypatch):
    batch, judge = prepared("sft")
    build = base.mean_nll(lambda: plain_torch.nll_of)
    assert judge(build(batch)())[1] == "ok"
    monkeypatch.setattr(base, "kept_rows", lambda batch, op: torch.arange(len(batch.kept)))
    verdict = judge(build(batch)())[1]
    assert "loss" in verdict
    assert "grad_hidden" in verdict


def test_the_other_divergence_is_wrong(prepared):
    batch, judge = prepared("kl")

    def forward_kl(hidden, weight, ref_hidden, ref_weight):
        logp, ref_logp = (hidden @ weight.t()).log_softmax(-1), (ref_hidden @ ref_weight.t()).log_softmax(-1)
        return (ref_logp.exp() * (ref_logp - logp)).sum(-1)

    assert judge(base.mean_kl(lambda: plain_torch.kl_of)(batch)())[1] == "ok"
    verdict = judge(base.mean_kl(lambda: forward_kl)(batch)())[1]
    assert "kl_max" in verdict
    assert "grad" in verdict


def test_a_wrong_adapter_is_shown_as_wrong_and_is_nobodys_rival(prepared, monkeypatch):
    entries = [base.Own("fast and wrong", base.mean_nll(lambda: lambda h, w, y: 0.5 * plain_torch.nll_of(h, w, y)))]
    monkeypatch.setitem(plain_torch.LOSSES, "sft", ())
    monkeypatch.setattr("benchmarks.contenders.roster.OWN_LOSSES", {"sft": tuple(entries)})
    found = [c for c in contenders("sft") if c.name in ("fast and wrong", "rk.sft_loss")]
    shape_base = draw(SHAPE, DTYPES["fp32"])
    batch, _ = for_op("sft", *shape_base)
    wrong, ours = compare("sft", batch, shape_base[1], None, found, seconds=0, rounds=2)
    assert wrong["verdict"].startswith("wrong: loss")
    assert ours["verdict"] == "ok"
    assert "fastest_peer" not in ours


STAND_INS = {
    "quack/linear_cross_entropy.py": """
import torch.nn.functional as F
def chunked_linear_cross_entropy(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True,
                                 use_scaled_exp=None):
    return F.cross_entropy((x @ weight.t()).float(), target, reduction=reduction)
""",
    "cut_cross_entropy/__init__.py": """
import torch.nn.functional as F
def linear_cross_entropy(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False,
                         filter_eps="high", impl="cce"):
    return F.cross_entropy((e @ c.t()).float(), targets, reduction=reduction)
""",
    "fla/__init__.py": "raise ImportError('wants much')",
    "fla/modules/__init__.py": "raise ImportError('wants much')",
    "fla/modules/fused_linear_cross_entropy/__init__.py": """
import torch.nn.functional as F
class FusedLinearCrossEntropyLoss:
    def __call__(self, x, target, weight, bias=None):
        return F.cross_entropy((x.flatten(0, 1) @ weight.t()).float(), target.flatten())
""",
    "verl/__init__.py": "raise ImportError('wants ray')",
    "verl/utils/__init__.py": "raise ImportError('wants more')",
    "verl/utils/kernel/__init__.py": "",
    "verl/utils/kernel/linear_cross_entropy.py": """
def linear_cross_entropy(hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
    logp = ((hidden @ weight.t()).float() / temperature).log_softmax(-1)
    return logp.gather(-1, labels[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)
""",
    "rl_triton/__init__.py": """
import torch
def compute_gae(rewards, values, terminateds, truncateds=None, gamma=.99, lambda_=.95, bootstrap_values=None,
                last_value=None):
    out, last, after = torch.empty_like(values), 0.0, last_value
    for t in reversed(range(values.shape[1])):
        last = rewards[:, t] + gamma * after - values[:, t] + gamma * lambda_ * last
        after, out[:, t] = values[:, t], last
    return out
""",
}
STAND_IN_PACKAGES = sorted({path.split("/")[0] for path in STAND_INS})


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Unpacked wheels of nobody, found by their folder; no real peer is in the way."""
    for path, source in STAND_INS.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(loading.FOLDERS, str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    hidden = {name: m for name, m in sys.modules.items() if name.split(".")[0] in STAND_IN_PACKAGES}
    for name in hidden:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in STAND_IN_PACKAGES]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("sft", "quack"), ("sft", "CCE"), ("sft", "flash-linear-attention"), ("train", "CCE"),
        ("score", "verl linear_cross_entropy"), ("train", "verl linear_cross_entropy"),
    ],
)  # fmt: skip
def test_unpacked_peers_are_found_and_called_as_they_want(prepared, stand_ins, op, name):
    batch, judge = prepared(op)
    (contender,) = [c for c in contenders(op) if c.name.startswith(name)]
    assert contender.gpu
    assert judge(contender.build(batch)())[1] == "ok"


def test_rl_triton_is_called_as_it_wants(stand_ins):
    (contender,) = [c for c in gae.CONTENDERS if c.gpu]
    drawn = replies.Replies.draw(3, 50)
    assert replies.judge_for(drawn)(contender.build(drawn)())[1] == "ok"


def test_who_is_not_installed_is_named(monkeypatch):
    monkeypatch.setenv(loading.FOLDERS, "")
    with pytest.raises(ImportError, match="nobody_at_all"):
        loading.module("nobody_at_all.kernels", ("nobody_at_all",))


def test_without_a_gpu_its_kernels_are_not_asked_for(prepared, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    batch, _ = prepared("sft")
    for contender in (c for c in contenders("sft") if c.gpu):
        with pytest.raises(base.Skipped, match="needs a GPU"):
            contender.build(batch)


def test_padding_puts_every_token_in_its_place(prepared):
    batch, _ = prepared("kto")
    order = base.chosen_first(batch)
    pad = base.Padding(batch, "kto", order)
    ids = pad(torch.arange(len(batch.kept)), -1)
    cu, kept = batch.cu_seqlens.tolist(), batch.kept
    for place, sequence in enumerate(order.tolist()):
        own = [i for i in range(cu[sequence], cu[sequence + 1]) if kept[i]]
        assert ids[place].tolist() == own + [-1] * (pad.tokens - len(own))
    assert order.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert liger.LOSSES["kto"]


def test_a_stub_is_only_where_nothing_can_be_imported(tmp_path, monkeypatch):
    for path, source in {
        "somebody/__init__.py": "", "somebody/kernels.py": "from somebody import here, missing\n",
        "somebody/here.py": "REAL = True\n", "somebody/lazy.py": "",
    }.items():  # fmt: skip
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    stubs = {"somebody.missing": {"REAL": False}, "somebody.here": {"REAL": False}}
    try:
        found = loading.module("somebody.lazy", ("somebody",), stubs)  # might want them when it runs
        assert found.__name__ == "somebody.lazy"
        assert sys.modules["somebody.here"].REAL
        assert not sys.modules["somebody.missing"].REAL
        with pytest.raises(ImportError, match="a stub is in its place"):
            loading.module("somebody.missing")
        assert loading.module("somebody.kernels", ("somebody",), stubs).here.REAL
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "somebody"]:
            del sys.modules[name]
