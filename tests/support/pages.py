"""Pages of examples, as they are run."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["sections"]


def sections(page: Path) -> list[tuple[str, str]]:
    """Return title and Python code of each section that has some, the part before the first title included."""
    title, *parts = re.split(r"^## (.*)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = [("", title), *zip(parts[::2], parts[1::2], strict=True)]
    blocks = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
    coded = [(name, "\n".join(blocks.findall(text))) for name, text in found]
    return [(name, code) for name, code in coded if code]
