"""From values to HTML. The templates are ours and lie beside this file; what comes from a run is escaped in them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """A template with its values filled in.

    Args:
        template: The name of a file in `templates/`.
        values: A text among them is escaped wherever it stands, unless the template says that it is HTML of ours
            (`safe`), and is never read as a template. Texts go in as values of lists and records, not as keys of
            dictionaries: Jinja looks an attribute up among the keys, too.

    Returns:
        HTML.
    """
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    """Jinja is imported where a report is written: `rlhf-train --help` does not wait for it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("trainer.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
