"""The chart of a comparison as SVG: for every model the engines' speeds, the fastest as full width.

Written by hand: a dozen bars are no reason to install a plotting library.
"""

import statistics
from html import escape
from typing import Any

_WIDTH, _LABEL, _BAR, _ROW, _HEAD = 860, 190, 190, 20, 34
_PANELS = (("prefill_tok_s", "prefill"), ("decode_tok_s", "decode"))
_OURS, _PEER, _INK = "#c2410c", "#64748b", "#1f2937"


def draw(results: dict[str, Any]) -> str:
    parts: list[str] = []
    y = 30
    for model in results["models"]:
        parts.append(_text(10, y + 20, model["title"], bold=True))
        for panel, (_, title) in enumerate(_PANELS):
            parts.append(_text(_left(panel), y + 20, f"{title}, tok/s"))
        y += _HEAD
        best = {
            key: max(statistics.median(engine[key]) for engine in model["engines"])
            for key, _ in _PANELS
        }
        for engine in model["engines"]:
            parts.append(_text(10, y + 13, engine["title"]))
            for panel, (key, _) in enumerate(_PANELS):
                parts += _bar(_left(panel), y, statistics.median(engine[key]), best[key], engine)
            y += _ROW
    cpu = f"{results['machine']['cpu']}, {results['threads']} threads, {results['machine']['date']}"
    parts.append(_text(10, 20, cpu))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 12}"'
        ' font-family="sans-serif" font-size="13">\n'
        f'<rect width="{_WIDTH}" height="{y + 12}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _left(panel: int) -> int:
    return 10 + _LABEL + panel * (_WIDTH - _LABEL) // len(_PANELS)


def _bar(x: int, y: int, value: float, best: float, engine: dict[str, Any]) -> list[str]:
    width = _BAR * value / best
    color = _OURS if engine["is_ours"] else _PEER
    return [
        f'<rect x="{x}" y="{y + 2}" width="{width:.1f}" height="{_ROW - 6}" fill="{color}"/>',
        _text(x + width + 6, y + 13, f"{value:.1f}" if value < 100 else f"{value:.0f}"),
    ]


def _text(x: float, y: float, text: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y}" fill="{_INK}"{weight}>{escape(text)}</text>'
