"""What `/version` says of every model, whatever its task."""

from pathlib import Path
from typing import Any, Protocol

from full_stack_transformer.serving.schemas import ServedModelFacts


class Served(Protocol):
    """A model that is served."""

    @property
    def name(self) -> str:
        """For clients."""

    @property
    def path(self) -> Path:
        """What was opened."""

    @property
    def description(self) -> dict[str, Any]:
        """That of the model directory."""

    @property
    def loaded_at(self) -> int:
        """Seconds since 1970."""

    @property
    def num_swaps(self) -> int:
        """How often it was replaced."""


def facts_of(served: Served, **others: Any) -> ServedModelFacts:
    """What people may know of a model.

    Args:
        served: the model.
        others: the fields that depend on its kind.
    """
    description = served.description
    return ServedModelFacts(
        model=served.name,
        checkpoint=served.path.name,
        step=_number(description.get("step"), int),
        validation_loss=_number(description.get("validation_loss"), float),
        num_swaps=served.num_swaps,
        loaded_at=served.loaded_at,
        description=description,
        **others,
    )


def _number(value: object, kind: type) -> Any:
    return value if isinstance(value, (int, kind)) and not isinstance(value, bool) else None
