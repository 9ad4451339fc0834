"""The errors that this package raises for its users. The class says who can fix the problem.

    FullStackTransformerError        base class
    ├── UsageError                   user of the command line: an option is missing, invalid or contradictory
    ├── InputError                   owner of the input files:
    │   ├── DocumentsError             texts are missing, unreadable, empty or without delimiter
    │   ├── TokenizerError             a tokenizer is invalid or does not fit
    │   ├── RowError                   labelled rows are unreadable or lack a field
    │   ├── DatasetError               a dataset directory is missing, damaged or does not fit
    │   └── ModelError                 a model directory is missing, damaged or does not fit
    ├── MachineError                 operator of the machine: port in use, disk full, no network
    │   ├── LostPeerError              another process of a training has ended
    │   └── MissingExtraError          a required package is not installed
    ├── TrainingError                user who chose the training options: the training cannot continue
    ├── RequestError                 client of the service: the request is invalid
    │   ├── AccessError                no valid key, or a web page of another origin
    │   │   └── AdminAccessError         the route is for who runs the service
    │   ├── UnknownModelError          the model is not served
    │   ├── ContextLengthError         the texts do not fit into the model's context
    │   ├── BodyTooLargeError          the body is too large
    │   └── BodyEncodingError          the body is compressed
    └── ServiceError                 operator of the service: it failed
        ├── ServiceUnavailableError    try again later
        │   └── ServiceBusyError       the queue is full; has the seconds to wait
        └── ServiceRefusedError        the same request will be rejected again

A message says what was wrong, where, and what to do. The command line shows it with an exit code, the service
as an HTTP status, the bot as a chat message. This module knows none of them.
"""

import pathlib


class FullStackTransformerError(Exception):
    """Base class of all errors that a user can fix."""

    exit_code = 1


class UsageError(FullStackTransformerError):
    """An option is missing, invalid or contradicts another one."""

    exit_code = 2


class InputError(FullStackTransformerError):
    """An input file or directory cannot be used."""


class DocumentsError(InputError):
    """Texts are missing, unreadable or empty."""


class TokenizerError(InputError):
    """A tokenizer cannot be loaded or does not fit."""


class RowError(InputError):
    """A labelled row cannot be read or lacks a field of its task."""


class DatasetError(InputError):
    """A dataset directory is missing, damaged or does not fit."""


class ModelError(InputError):
    """A model directory is missing, damaged or does not fit."""


class MachineError(FullStackTransformerError):
    """The machine is the problem: port in use, disk full, no network."""


class LostPeerError(MachineError):
    """Another process of the training has ended, or cannot be reached: it can go on from what is saved."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class MissingExtraError(MachineError):
    """A package of an extra is not installed."""


def install_command(extra: str) -> str:
    """The command that installs an extra: in a checkout with its constraints, else from the index."""
    if (pathlib.Path(__file__).parents[1] / "constraints.txt").is_file():
        return f"pip install -c constraints.txt -e '.[{extra}]'"
    return f"pip install 'full_stack_transformer[{extra}]'"


class TrainingError(FullStackTransformerError):
    """Training cannot continue, such as after a NaN loss."""


class RequestError(FullStackTransformerError):
    """A request is invalid."""


class AccessError(RequestError):
    """A request has no valid key, or comes from a web page of another origin."""


class AdminAccessError(AccessError):
    """A request for what only who runs the service may do."""


class UnknownModelError(RequestError):
    """A request names a model that is not served."""


class ContextLengthError(RequestError):
    """Prompt and answer do not fit into the model's context."""


class BodyTooLargeError(RequestError):
    """The body of a request is too large."""


class BodyEncodingError(RequestError):
    """The body of a request is compressed, which is not read."""


class ServiceError(FullStackTransformerError):
    """The service failed to answer."""


class ServiceUnavailableError(ServiceError):
    """The service is unreachable or overloaded; the same request may succeed later."""


class ServiceBusyError(ServiceUnavailableError):
    """The queue is full."""

    def __init__(self, message: str, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ServiceRefusedError(ServiceError):
    """The service rejected the request and would reject it again."""
