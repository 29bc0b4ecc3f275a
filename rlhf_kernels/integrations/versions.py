"""Which versions of somebody else's package an adapter has been tested against."""

from __future__ import annotations

import re
from importlib import metadata


def require(package: str, low: str, high: str) -> str:
    """The installed version of a package, if it is one that the adapter is known to work with.

    Args:
        package: name of the distribution, as in ``pip install``.
        low: first version that will do.
        high: first version that will not.

    Returns:
        The version, as its package states it.

    Raises:
        ImportError: the package is missing, or its version is outside ``low <= version < high``.

    >>> from rlhf_kernels.integrations.versions import require
    >>> require("torch", "2.0", "3").split(".")[0]
    '2'
    >>> require("torch", "99", "100")
    Traceback (most recent call last):
    ImportError: torch: got version ..., wants >=99,<100; pip install "torch>=99,<100"
    """
    wanted = f'wants >={low},<{high}; pip install "{package}>={low},<{high}"'
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{package}: got none installed, {wanted}") from None
    if not _release(low) <= _release(found) < _release(high):
        raise ImportError(f"{package}: got version {found}, {wanted}")
    return found


def _release(version: str) -> tuple[int, ...]:
    """Its numbers, without zeros at the end: a release candidate counts as the release, so 1.16.0rc1+cpu is (1, 16)."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(x) for x in numbers[0].split(".")] if numbers else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)
