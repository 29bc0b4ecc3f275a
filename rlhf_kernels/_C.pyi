"""csrc/bind.cpp: kernels over addresses; zero stands for a tensor that is not there."""

PARTIAL_DOUBLES: int

def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def has_head() -> bool: ...
def offer_pages(data: int, bytes: int, /) -> bool: ...

class Work:
    def __init__(self, *, rows: int, vocab: int, threads: int) -> None: ...

class Transform:
    def __init__(self, *, bias: int = 0, temperature: int = 0, scale: float = 1.0, softcap: float = 0.0) -> None: ...

class Strip:
    def __init__(self, *, z: int = 0, ld: int = 0, first: int = 0, width: int = 0) -> None: ...

class Targets:
    def __init__(self, *, ids: int, z: int, count: int) -> None: ...

class Sums:
    def __init__(self, *, policy: int, reference: int = 0, forward_kl: bool = False) -> None: ...

class UpstreamGrads:
    def __init__(self, logp: int, entropy: int, lse: int, mean_logit: int, kl: int, /) -> None: ...

class Head:
    def __init__(
        self, *, hidden: int = 0, ld_hidden: int = 0, weight: int = 0, ld_weight: int = 0, size: int = 0
    ) -> None: ...

class Sinks:
    def __init__(
        self, *, hidden: int, weight: int, ld_weight: int, bias: int, fresh: bool, round_weight: bool
    ) -> None: ...

class Dtype:
    float32: Dtype
    bfloat16: Dtype
    float16: Dtype

def push(
    wide: bool, work: Work, policy: Strip, reference: Strip, transform: Transform, transform_reference: Transform,
    targets: Targets, sums: Sums, /,
) -> None: ...  # fmt: skip
def finish(
    wide: bool, work: Work, targets: Targets, sums: Sums, logp: int, entropy: int, lse: int, mean_logit: int,
    top1: int, kl: int, /,
) -> None: ...  # fmt: skip
def grad(
    wide: bool, work: Work, index: int, policy: Strip, reference: Strip, transform: Transform, targets: Targets,
    sums: Sums, upstream: UpstreamGrads, grad: int, ld_grad: int, /,
) -> None: ...  # fmt: skip
def gae(
    wide: bool, rewards: int, values: int, cu_seqlens: int, mask: int, bootstrap: int, advantages: int, returns: int,
    sequences: int, gamma: float, lam: float, threads: int, /,
) -> None: ...  # fmt: skip
def head_forward(
    dtype: Dtype, policy: Head, reference: Head, work: Work, z: Strip, z_reference: Strip, transform: Transform,
    transform_reference: Transform, targets: Targets, sums: Sums, /,
) -> None: ...  # fmt: skip
def head_backward(
    dtype: Dtype, policy: Head, work: Work, index: int, z: Strip, z_reference: Strip, transform: Transform,
    targets: Targets, sums: Sums, upstream: UpstreamGrads, sinks: Sinks, /,
) -> None: ...  # fmt: skip
def head_select(
    work: Work, index: int, z: Strip, z_reference: Strip, transform: Transform, targets: Targets, sums: Sums,
    upstream: UpstreamGrads, allowed: float, floor: int, most: int, counts: int, lost: int, norm: int, /,
) -> None: ...  # fmt: skip
def head_sparse(
    dtype: Dtype, policy: Head, work: Work, index: int, logits: Strip, counts: int, sinks: Sinks, /,
) -> None: ...  # fmt: skip
