# SPDX-License-Identifier: Apache-2.0
"""What the documentation build adds to mkdocs: the README and its like as pages, and docstring examples as code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parent.parent
INCLUDED = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put a file of the root in place of the page that stands for it; its links are made to hold on the site."""
    name = INCLUDED.get(page.file.src_uri)
    if name is None:
        return markdown
    text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](").replace("[Apache-2.0](LICENSE)", "Apache-2.0")
    for uri, source in INCLUDED.items():
        text = text.replace(f"]({source})", f"]({uri})")
    return text


class Examples(griffe.Extension):
    """Read a docstring's "Example:" as a section of doctests, which griffe does for "Examples:"."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")
