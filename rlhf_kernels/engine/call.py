"""One validated call of the head: which rows, which logits, which backend, how much memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Unpack, cast

import torch
from torch import Tensor

from rlhf_kernels import checks as check
from rlhf_kernels.backends import resolve
from rlhf_kernels.backends.vocab_parallel import VocabParallel
from rlhf_kernels.engine.kept import Kept
from rlhf_kernels.types import Backend, Head, HeadOptions, Reference, SparseBackend, Tile

MAX_BYTES = {"cpu": 256 * 2**20}  # measured: larger tiles gain under 2 % at a vocabulary of 152k
MAX_BYTES_GPU = 1_700_000_000
# Scoring keeps no logits: only re-reading the weight speaks for large tiles, and on a GPU the number of launches.
SCORE_ROWS = {False: 2048, True: 8192}
SCORE_BYTES = 65536  # of scratch per row, which the seam allows

RefArgument = tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Call:
    """Everything about a call but its differentiable tensors, which ``bind`` puts in."""

    head: Head
    targets: Tensor  # [N, K]
    ignored: Tensor | None  # [N, K] bool: ids without a value, in rows that are kept for another id
    kept: Kept  # the rows that meet the head
    temperature: float | Tensor  # or [N]
    reference: Reference | None
    backend: Backend
    max_bytes: int
    checks: bool
    weight_grad: Tensor | None
    loss_scale: float
    hidden: Tensor
    tolerance: float | None = None
    overwrite: bool = False  # the gradient of ready logits takes their place
    spare: int = 0  # bytes that a call whose rows all fit at once does without elsewhere

    def bind(self, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Call:
        """The same call over these tensors (as autograd gives them back), without their history."""
        vocab = self.vocab
        cut = None if weight is None else weight.detach()[:vocab]
        head = replace(self.head, weight=cut, bias=None if bias is None else bias.detach()[:vocab])
        return replace(self, hidden=hidden.detach().reshape(-1, hidden.shape[-1]), head=head)

    @property
    def vocab(self) -> int:
        return self.hidden.shape[1] if self.head.weight is None else self.head.weight.shape[0]

    @property
    def rows(self) -> int:
        """How many rows meet the head."""
        return self.kept.rows

    def tile(self, start: int, stop: int, rows: Tensor | None = None) -> Tile:
        """Kept rows start to stop, or only those of them that ``rows`` counts from start."""

        def take(x: Tensor, fill: float = 0) -> Tensor:
            x = self.kept.pick(x, start, stop, fill)
            return x if rows is None else x[rows]

        temperature, ref = self.temperature, self.reference
        return Tile(
            hidden=take(self.hidden).contiguous(),
            head=self.head,
            targets=take(self.targets),
            temperature=take(temperature, 1.0) if isinstance(temperature, Tensor) else temperature,
            reference=None if ref is None else replace(ref, hidden=take(ref.hidden).contiguous()),
        )

    def tile_rows(self) -> int:
        """How many rows may hold their logits at once."""
        each = max(1, self.backend.residual_bytes(self.tile(0, 0)))
        if self.tolerance is not None:
            each += cast(SparseBackend, self.backend).entries_bytes(self.tile(0, 0))
        if self.rows * each <= self.max_bytes + self.spare:
            return max(1, self.rows)
        return max(1, self.max_bytes // each)

    def at_once(self) -> Call:
        """The same, where all rows at once may hold what several spans would need for a bfloat16 weight's gradient.

        Those add it up in float32; a single one writes it, and needs no more memory than they do. Ranks that share a
        head must cut their rows alike, and their parts differ in size.
        """
        weight = self.head.weight
        if weight is None or weight.dtype != torch.bfloat16 or self.weight_grad is not None:
            return self
        return self if isinstance(self.backend, VocabParallel) else replace(self, spare=4 * weight.numel())

    def score_rows(self) -> int:
        """How many rows may be scored at once."""
        return min(SCORE_ROWS[self.hidden.is_cuda], max(1, self.max_bytes // SCORE_BYTES))


def _reference(
    ref: RefArgument, ref_head: HeadOptions | None, direction: str, names: tuple[str, str], hidden: Tensor, vocab: int,
    policy: HeadOptions,
) -> Reference | None:  # fmt: skip
    if ref is None:
        return None
    check.wants(isinstance(ref, (tuple, list)) and len(ref) == 2, "ref", ref, "(ref_hidden, ref_weight), or None")
    ref_hidden, ref_weight = ref
    check.float_tensor(names[0], ref_hidden)
    check.float_tensor(names[1], ref_weight, 2)
    check.wants(ref_hidden.dim() > 0, names[0], ref_hidden, "[..., H]")
    lead, width = tuple(hidden.shape[:-1]), ref_hidden.shape[-1]
    check.wants(tuple(ref_hidden.shape[:-1]) == lead, names[0], ref_hidden, f"shape {[*lead, 'H']}, as hidden")
    cut = policy.get("vocab_size") is not None  # then both heads may be padded, each in its way
    fits = ref_weight.shape[0] >= vocab if cut else ref_weight.shape[0] == vocab
    check.wants(
        fits and ref_weight.shape[1] == width, names[1], ref_weight, f"[{vocab}, {width}], the policy's vocabulary"
    )
    for name, x in zip(names, (ref_hidden, ref_weight), strict=True):
        check.wants(x.dtype == hidden.dtype, name, x, f"the dtype of hidden, {hidden.dtype}")
        check.wants(x.device == hidden.device, name, x, f"device {hidden.device}, where hidden is")
    if ref_head is None:  # mostly it is an older copy of the policy
        check.wants(policy.get("bias") is None, "ref_head", None, "the reference's bias, as the policy's head has one")
        ref_head = HeadOptions(softcap=policy.get("softcap"), logit_scale=policy.get("logit_scale", 1.0))
    check.wants(isinstance(ref_head, dict), "ref_head", ref_head, "a dict with bias, softcap and logit_scale, or None")
    unknown = ref_head.keys() - {"bias", "softcap", "logit_scale"}
    check.wants(not unknown, "ref_head", sorted(map(str, unknown)), "bias, softcap and logit_scale only")
    check.one_of("direction", direction, ("reverse", "forward"))
    head = _head(ref_hidden, ref_weight, vocab, ref_head, "ref_head: ")
    return Reference(ref_hidden.detach().reshape(-1, width), head, direction, names)


def _kept(targets: Tensor, ignore_index: int, max_targets: int | None) -> tuple[Tensor, Tensor | None, Kept]:
    """Targets with ids in place of the ignored ones, which ids those are, and the rows left over."""
    ignored = targets == ignore_index
    partly = ignored if targets.shape[1] > 1 else None
    return targets.masked_fill(ignored, 0), partly, Kept.of(~ignored.all(1), max_targets)


def _head(hidden: Tensor, weight: Tensor | None, vocab: int, options: HeadOptions, whose: str = "") -> Head:
    bias, softcap, scale = options.get("bias"), options.get("softcap"), options.get("logit_scale", 1.0)
    width = hidden.shape[-1] if weight is None else weight.shape[0]
    if bias is not None:
        check.shaped(f"{whose}bias", bias, (width,), hidden.device, "one per row of weight")
        check.wants(bias.dtype == hidden.dtype, f"{whose}bias", bias, f"the dtype of hidden, {hidden.dtype}")
    if softcap is not None:
        check.positive(f"{whose}softcap", softcap)
    check.wants(check.is_finite(scale) and scale != 0, f"{whose}logit_scale", scale, "a finite number other than zero")
    return Head(
        weight=None if weight is None else weight.detach()[:vocab],
        bias=None if bias is None else bias.detach()[:vocab],
        softcap=softcap,
        logit_scale=scale,
    )


def _temperature(value: float | Tensor, targets: Tensor, per_position: int, hidden: Tensor) -> float | Tensor:
    if not isinstance(value, Tensor):
        check.positive("temperature", value)
        return float(value)
    lead = tuple(targets.shape[: targets.dim() - per_position])
    check.shaped("temperature", value, lead, hidden.device, "one per token")
    check.float_tensor("temperature", value)
    check.wants(not value.requires_grad, "temperature", value, "a tensor without gradient")
    return value.reshape(-1).to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)


def _parallel(backend: Backend, width: int, ref: RefArgument, options: HeadOptions) -> VocabParallel | None:
    """This rank's share in a head that is spread over ranks."""
    group, vocab = options.get("tp_group"), options.get("vocab_size")
    check.process_group("tp_group", group)
    if group is None:
        return None
    check.wants(vocab is None or check.is_count(vocab), "vocab_size", vocab, "1 or more, or None")
    check.wants(ref is None, "tp_group", "a group", "None with an exact KL, which needs both heads whole")
    tolerance = options.get("tolerance")
    check.wants(tolerance is None, "tolerance", tolerance, "None where the head is spread over ranks")
    return VocabParallel.of(backend, group, width, vocab)


def _columns(width: int, parallel: VocabParallel | None, asked: int | None) -> int:
    """How many rows of the weight exist."""
    if parallel is None:
        vocab = width if asked is None else asked
        fits = check.is_count(vocab) and vocab <= width
        check.wants(fits, "vocab_size", vocab, f"1 to {width}, the rows of weight")
        return vocab
    check.wants(parallel.everyone, "vocab_size", asked, "columns for every rank of tp_group")
    return parallel.columns


def _agreed(parallel: VocabParallel, width: int, device: torch.device, *facts: int) -> None:
    """Ranks that do not agree on a call would wait for each other for ever, so all of them hear of it."""
    fits = parallel.columns <= width
    same = parallel.same(int(fits), *facts, device=device)
    check.wants(fits, "weight", f"{width} rows", f"{parallel.columns}, this rank's of {parallel.vocab}")
    check.holds(same, "tp_group: wants the same targets, vocab_size and max_bytes, and enough weight, on all its ranks")


def _for_autograd(hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Autograd cannot save what was made under ``torch.inference_mode``."""
    given = {"hidden" if weight is not None else "logits": hidden, "weight": weight, "bias": bias}
    tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values()):
        for name, x in tensors.items():
            check.wants(not x.is_inference(), name, x, "a tensor made outside torch.inference_mode: clone it")


def prepare(
    hidden: Tensor,
    weight: Tensor | None,
    targets: Tensor,
    per_position: int = 0,
    ref: RefArgument = None,
    ref_head: HeadOptions | None = None,
    direction: str = "reverse",
    ref_names: tuple[str, str] = ("ref[0]", "ref[1]"),
    **options: Unpack[HeadOptions],
) -> Call:
    """Check every argument of the head, before any work starts."""
    check.report()
    check.no_transforms()
    with_checks = check.wanted(options)
    unknown = options.keys() - HeadOptions.__annotations__.keys()
    if unknown:
        known = ", ".join(HeadOptions.__annotations__)
        raise TypeError(f"{min(unknown)}: no argument of this function, and no option of a head; those are {known}")
    if weight is None:
        check.float_tensor("logits", hidden)
        check.wants(hidden.dim() > 0, "logits", hidden, "[..., V]")
        check.target_arguments(hidden, targets, per_position, "logits")
    else:
        check.head_arguments(hidden, weight, targets, per_position)
    _for_autograd(hidden, weight, options.get("bias"))
    width = hidden.shape[-1] if weight is None else weight.shape[0]
    backend = resolve(options.get("backend", "auto"), hidden.device, hidden.dtype)
    parallel = _parallel(backend, width, ref, options)
    vocab = _columns(width, parallel, options.get("vocab_size"))
    built = _head(hidden, weight, vocab, options)
    reference = _reference(ref, ref_head, direction, ref_names, hidden, vocab, options)
    temperature = _temperature(options.get("temperature", 1.0), targets, per_position, hidden)
    weight_grad, scale = options.get("weight_grad"), options.get("loss_scale", 1.0)
    if weight_grad is not None:
        check.wants(weight is not None, "weight_grad", weight_grad, "a head to belong to, not ready logits")
        assert weight is not None
        check.shaped("weight_grad", weight_grad, tuple(weight.shape), hidden.device, "as weight")
        full = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        usable = torch.is_inference_mode_enabled() or not weight_grad.is_inference()
        check.wants(usable, "weight_grad", weight_grad, "a buffer made outside torch.inference_mode")
        check.wants(weight_grad.dtype == full, "weight_grad", weight_grad, str(full).removeprefix("torch."))
        its_own = weight_grad.data_ptr() != weight.data_ptr() and 0 not in weight_grad.stride()
        check.wants(its_own, "weight_grad", weight_grad, "a buffer that shares no memory with weight, nor with itself")
    check.wants(check.is_finite(scale) and scale != 0, "loss_scale", scale, "a finite number other than zero")
    default = MAX_BYTES.get(hidden.device.type, MAX_BYTES_GPU)
    max_bytes = options.get("max_bytes")
    max_bytes = default if max_bytes is None else max_bytes
    check.wants(check.is_count(max_bytes), "max_bytes", max_bytes, "a positive whole number of bytes")
    tolerance = options.get("tolerance")
    if tolerance is not None:
        check.wants(check.is_number(tolerance) and 0 < tolerance < 1, "tolerance", tolerance, "above 0 and below 1")
        check.wants(weight is not None, "tolerance", tolerance, "None where there is no head, and no product to save")
    flat = targets.reshape(hidden.shape[:-1].numel(), -1).long() if targets.numel() else targets.reshape(0, 1).long()
    most = options.get("max_targets")
    check.wants(most is None or check.is_count(most), "max_targets", most, "a positive whole number, or None")
    most = None if most is None else min(most, flat.shape[0])
    ignore_index = options.get("ignore_index", -100)
    check.ignore_index(ignore_index)
    clean, partly, kept = _kept(flat, ignore_index, most or None)
    rows_of_hidden = hidden.detach().reshape(-1, hidden.shape[-1])
    if with_checks and parallel is not None:
        _agreed(parallel, width, hidden.device, kept.rows, max_bytes, int(clean.sum()) if clean.is_cpu else 0)
    if with_checks and kept.rows:
        most, ids = (vocab if parallel is None else parallel.vocab) - 1, "token_ids" if per_position else "targets"
        check.holds(
            ((clean >= 0) & (clean <= most)).all(),
            f"{ids}: got ids from {int(clean.min())} to {int(clean.max())}, wants 0 to {most} or ignore_index"
            if not clean.is_cuda
            else f"{ids}: an id is outside the vocabulary",
        )
        check.finite_rows(rows_of_hidden, kept.index, kept.real) if weight is not None else None
        if isinstance(temperature, Tensor):
            at = kept.pick(temperature, 0, kept.rows, 1.0)
            check.holds(((at > 0) & torch.isfinite(at)).all(), "temperature: wants positive finite numbers")
    return Call(
        head=built,
        targets=clean,
        ignored=partly,
        kept=kept,
        temperature=temperature,
        reference=reference,
        backend=backend if parallel is None else parallel,
        max_bytes=max_bytes,
        checks=with_checks,
        weight_grad=weight_grad,
        loss_scale=float(scale),
        hidden=rows_of_hidden,
        tolerance=tolerance,
    )
