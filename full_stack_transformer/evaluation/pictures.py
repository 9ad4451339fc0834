"""A confusion matrix as a picture: SVG, which needs no package and stays sharp."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

_CELL = 36
_CHARACTER = 7
_MAX_LABEL_CHARACTERS = 24


def confusion_picture(labels: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    """An SVG document: a row for each expected class, a column for each predicted one.

    The darker a cell, the greater its part of the row.

    Args:
        labels: (classes,) their names.
        confusion: (classes, classes) counts.
    """
    names = [_shortened(label) for label in labels]
    margin = max(map(len, names)) * _CHARACTER + 30
    side = margin + len(names) * _CELL + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{side}" height="{side}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{side}" height="{side}" fill="white"/>',
        f'<text x="{margin}" y="14">predicted</text>',
        f'<text x="4" y="{margin - 8}">expected</text>',
    ]
    for number, name in enumerate(names):
        middle = margin + number * _CELL + _CELL / 2
        parts.append(f'<text x="{margin - 6}" y="{middle + 4}" text-anchor="end">{name}</text>')
        parts.append(
            f'<text transform="translate({middle + 4},{margin - 6}) rotate(-90)">{name}</text>'
        )
    for row, counts in enumerate(confusion):
        total = max(1, sum(counts))
        for column, count in enumerate(counts):
            parts += _cell(
                margin + column * _CELL, margin + row * _CELL, count, count / total, row == column
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(x: int, y: int, count: int, share: float, is_right: bool) -> list[str]:
    light = round(100 - 65 * share)
    hue = 145 if is_right else 15
    ink = "white" if share > 0.7 else "black"
    square = (
        f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" stroke="#ddd" '
        f'fill="hsl({hue},55%,{light}%)"/>'
    )
    if not count:
        return [square]
    middle = x + _CELL / 2
    return [
        square,
        f'<text x="{middle}" y="{y + _CELL / 2 + 4}" text-anchor="middle" fill="{ink}">{count}</text>',
    ]


def _shortened(label: str) -> str:
    if len(label) > _MAX_LABEL_CHARACTERS:
        label = f"{label[: _MAX_LABEL_CHARACTERS - 1]}…"
    return escape(label)
