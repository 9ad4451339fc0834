"""One exception tree, drawn in full, and every leaf has a status in the service."""

import inspect

from full_stack_transformer import errors
from full_stack_transformer.errors import FullStackTransformerError
from full_stack_transformer.serving.app import STATUS_OF_ERROR

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass)]


def test_every_error_is_drawn_in_the_tree() -> None:
    assert errors.__doc__ is not None
    for cls in CLASSES:
        assert issubclass(cls, FullStackTransformerError)
        assert cls.__name__ in errors.__doc__
        assert cls.__doc__


def test_every_error_has_a_status() -> None:
    for cls in CLASSES:
        statuses = [status for kind, status, _ in STATUS_OF_ERROR if issubclass(cls, kind)]
        assert 400 <= statuses[0] <= 599
