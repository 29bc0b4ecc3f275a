"""For the generator of the site: README, CONTRIBUTING and CHANGELOG are pages too; links from them are put right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)?examples/[^)]*\)")  # folders that are no pages of the site
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that lie at the top of the repository."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, moved in PAGES.items():
            text = text.replace(f"]({other})", f"]({moved})")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of the site become words; the empty line that ends a block for doctest goes."""
    return re.sub(r"\n\n```\n", "\n```\n", OUTSIDE.sub(r"`\1`", markdown))
