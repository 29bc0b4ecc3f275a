"""How far a run is: what every state of a stage begins with."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Progress:
    """Base of every stage's state."""

    step: int = 0
    """Steps finished."""
    part: int = 0
    """Safe points passed since; only the RL loop has some within a step."""
    over: bool = False
    """Set where a stage ends before its last step."""
    last: dict[str, float] = field(default_factory=dict)
    """Metrics of the latest step."""
