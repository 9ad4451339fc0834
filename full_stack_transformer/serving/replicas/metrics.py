"""Metrics of several replicas as one text of Prometheus."""

import re
from collections.abc import Iterable


def merged(texts: Iterable[tuple[str, bytes]]) -> bytes:
    """Metrics of several replicas, each with the label `replica`; each family is described once."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for name, text in texts:
        family = ""
        for line in text.decode().splitlines():
            if line.startswith("#"):
                family = line.split(" ", 3)[2]
                lines = heads.setdefault(family, [])
                if line not in lines:
                    lines.append(line)
            elif line:
                samples.setdefault(family, []).append(_labelled(line, name))
    return "".join(
        f"{line}\n"
        for family, lines in heads.items()
        for line in (*lines, *samples.get(family, []))
    ).encode()


def _labelled(sample: str, replica: str) -> str:
    found = re.match(r"([a-zA-Z0-9_:]+)(\{)?", sample)
    assert found is not None
    label = f'replica="{replica}"'
    rest = sample[found.end() :]
    return f"{found[1]}{{{label},{rest}" if found[2] else f"{found[1]}{{{label}}}{rest}"
