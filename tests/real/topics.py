"""Questions for a real model: what it thinks about everyday things. Those it is asked in the end are none of those
that it learns from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

TRAIN = (
    *("rain", "trains", "libraries", "cats", "mountains", "coffee", "chess", "bicycles", "the sea", "tomatoes"),
    *("early mornings", "board games", "old books", "football", "bread", "museums", "cooking", "the moon"),
    *(
        "long walks",
        "jazz",
        "tea",
        "autumn",
        "swimming",
        "letters",
        "markets",
        "big cities",
        "snow",
        "bees",
        "painting",
    ),
)
HELD_OUT = (
    *("winter", "dogs", "dancing", "camping", "chocolate", "the violin", "rivers", "birds", "photography", "apples"),
    *("spring", "theatre", "bridges", "soup", "running", "stars", "kites", "cheese", "forests", "clocks"),
    *("islands", "pottery", "honey", "sailing"),
)


def write(path: Path, topics: Sequence[str]) -> Path:
    """A file of prompts, as messages."""
    asked = [[{"role": "user", "content": f"What do you think about {topic}?"}] for topic in topics]
    path.write_text("".join(json.dumps({"prompt": messages}) + "\n" for messages in asked), encoding="utf-8")
    return path
