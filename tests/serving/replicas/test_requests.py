"""How requests begin."""

import json

import pytest

from full_stack_transformer.serving.replicas.requests import BLOCK_CHARACTERS, beginning_of

TEXT = "x" * BLOCK_CHARACTERS + "y" * BLOCK_CHARACTERS


def _beginning(body: object, key: bytes = b"") -> tuple[bytes, ...]:
    return beginning_of(json.dumps(body).encode(), key)


def test_requests_share_the_blocks_that_their_texts_share() -> None:
    one = _beginning({"prompt": TEXT + "and more", "model": "m", "seed": 1})
    other = _beginning({"seed": 2, "model": "m", "prompt": "x" * BLOCK_CHARACTERS + "z" * 99})
    assert len(one) == len(other) == 2
    assert one[0] == other[0]
    assert one[1] != other[1]


def test_keys_and_models_share_nothing() -> None:
    found = {
        _beginning({"prompt": TEXT, "model": model}, key)[0]
        for model in ("m", "n", None)
        for key in (b"", b"Bearer a")
    }
    assert len(found) == 6


def test_conversations_begin_with_their_first_messages() -> None:
    system = {"role": "system", "content": TEXT}
    one = _beginning({"messages": [system, {"role": "user", "content": "Hello"}]})
    # The same with the fields in another order, and content as parts.
    parts = {"content": [{"type": "text", "text": TEXT}], "role": "system"}
    other = _beginning({"messages": [parts, {"role": "user", "content": "Good bye" * 20}]})
    assert one[0] == other[0]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"\xff", b"{}", b'{"prompt": "short"}', b'{"prompt": null}']
)
def test_what_has_no_text_has_no_beginning(body: bytes) -> None:
    assert beginning_of(body) == ()


def test_any_json_is_read() -> None:
    for value in (1, True, {"a": 1}, [[1, 2], None], ["\ud800" * 100], {"content": {"text": TEXT}}):
        beginning_of(json.dumps({"messages": value, "model": value}).encode())
    assert len(_beginning({"prompt": list(range(1000))})) > 10
