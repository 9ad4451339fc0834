"""Bodies made from a route's own JSON schema: some fit, most miss it in one or two places.

What schemathesis does in the long run, small enough for every run of the tests. Knows JSON schemas as
pydantic writes them.
"""

import random
from typing import Any

_ODD_VALUES: tuple[Any, ...] = (
    *(None, True, "", "x", "\x00", "é🙂", -1, 0, 1, 2**31, 2**63, 10**40, 0.5, -1e308),
    *([], {}, [[]], [None], {"": None}, ["x"] * 200, [0] * 200, "y" * 5000),
)


def near_miss(schema: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A body."""
    properties: dict[str, Any] = schema["properties"]
    names = set(schema.get("required", ()))
    names |= set(chance.sample(sorted(properties), chance.randrange(min(6, len(properties)))))
    body = {name: _value(properties[name], chance) for name in sorted(names)}
    for _ in range(chance.choice((0, 1, 1, 2))):
        name = chance.choice([*properties, "unknown", "prompt", "messages"])
        body[name] = chance.choice(_ODD_VALUES)
    return body


def _value(schema: dict[str, Any], chance: random.Random) -> Any:
    """Something that the schema allows, or stands at one of its borders."""
    if kinds := schema.get("anyOf", schema.get("oneOf")):
        return _value(chance.choice(kinds), chance)
    if "enum" in schema:
        return chance.choice(schema["enum"])
    if "const" in schema:
        return schema["const"]
    kind = schema.get("type")
    if kind == "string":
        return chance.choice(("x", "The", "é🙂", "1", "a" * schema.get("maxLength", 9)))[:2000]
    if kind in ("integer", "number"):
        low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
        high = schema.get("maximum", 100)
        found = chance.choice((low, high, low - 1, high + 1, 1, 2))
        return float(found) if kind == "number" else found
    if kind == "boolean":
        return chance.random() < 0.5
    if kind == "array":
        return [_value(schema.get("items", {}), chance) for _ in range(chance.randrange(4))]
    if kind == "object" and "properties" in schema:
        return near_miss(schema, chance)
    return chance.choice(_ODD_VALUES)
