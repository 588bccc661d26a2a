"""Draw shares as bars, readable on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Collection
from html import escape

__all__ = ["bars"]

_WIDTH, _LEFT, _RIGHT, _ROW = 860, 330, 60, 20
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#24292f}.name{text-anchor:end}.head{font-weight:600}"
    ".ours{fill:#0969da}.other{fill:#8c959f}.all{stroke:#8c959f;stroke-dasharray:2 3}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.ours{fill:#58a6ff}.other{fill:#6e7681}}"
)


def bars(groups: dict[str, dict[str, float]], ours: Collection[str], caption: str) -> str:
    """Return an SVG of `groups`: by title, shares of 1 by name; the bars of `ours` stand out."""
    full = _WIDTH - _LEFT - _RIGHT
    parts = [f"<style>{_STYLE}</style>", f'<text x="8" y="20" class="head">{escape(caption)}</text>']
    y = 36
    for title, shares in groups.items():
        parts.append(f'<text x="{_LEFT}" y="{y + 14}" class="head">{escape(title)}</text>')
        y += 22
        bottom = y + _ROW * len(shares)
        parts.append(f'<line x1="{_LEFT + full}" x2="{_LEFT + full}" y1="{y}" y2="{bottom}" class="all"/>')
        for name, share in shares.items():
            width = full * min(max(share, 0.0), 1.0)
            kind = "ours" if name in ours else "other"
            parts += [
                f'<text x="{_LEFT - 8}" y="{y + 13}" class="name">{escape(name)}</text>',
                f'<rect x="{_LEFT}" y="{y + 2}" width="{width:.1f}" height="{_ROW - 5}" class="{kind}"/>',
                f'<text x="{_LEFT + width + 6:.1f}" y="{y + 13}">{share:.1%}</text>',
            ]
            y += _ROW
        y += 16
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}">\n{body}\n</svg>\n'
