"""Every error that this package raises on purpose, and who must act on it.

    FullStackTransformerError        something a person can mend
    ├── UsageError                   who typed the command: an option is missing, wrong or contradicts another
    ├── InputError                   who supplied the files
    │   ├── DocumentsError           texts: missing, unreadable, empty, without delimiter
    │   ├── TokenizerError           a vocabulary that is none, or does not fit
    │   ├── RowError                 labelled rows: unreadable, or without what their task needs
    │   ├── DatasetError             a dataset directory that is none, or damaged
    │   └── ModelError               a model directory that is none, or does not fit
    ├── MachineError                 who runs the machine: port in use, disk full, no network
    │   └── MissingExtraError        a package that this command needs is not installed
    ├── TrainingError                who chose the options of a training that cannot go on
    ├── RequestError                 who sent a request to the service: impossible as it stands
    │   ├── AccessError              without a key, or from a page of another site
    │   ├── UnknownModelError        for a model that is not served
    │   └── BodyTooLargeError        with more bytes than are read
    └── ServiceError                 who runs the service: unreachable, overloaded, failing
        ├── ServiceUnavailableError  try again later
        │   └── ServiceBusyError     the queue is full; the error says for how long
        └── ServiceRefusedError      the same request will be refused again

A message says what was expected, what was found, where, and what to do.
The command line turns an error into one sentence and an exit code, the service into a status,
the bot into one friendly message. This module knows none of them.
"""


class FullStackTransformerError(Exception):
    """Base of all errors that a person can mend."""

    exit_code = 1


class UsageError(FullStackTransformerError):
    """An option is missing, wrong or contradicts another one."""

    exit_code = 2


class InputError(FullStackTransformerError):
    """A file or directory that the user supplied cannot be used."""


class DocumentsError(InputError):
    """Texts are missing, unreadable or empty."""


class TokenizerError(InputError):
    """A tokenizer cannot be loaded, or does not fit its purpose."""


class RowError(InputError):
    """A labelled row cannot be read, or lacks what its task needs."""


class DatasetError(InputError):
    """A dataset directory is missing, damaged or does not fit."""


class ModelError(InputError):
    """A model directory is missing, damaged or does not fit."""


class MachineError(FullStackTransformerError):
    """The machine cannot do what was asked: port in use, disk full, no network."""


class MissingExtraError(MachineError):
    """A package that belongs to an extra is not installed."""


class TrainingError(FullStackTransformerError):
    """Training cannot go on, such as after a loss that is not a number."""


class RequestError(FullStackTransformerError):
    """A request that can never be served as it stands."""


class AccessError(RequestError):
    """A request without a valid key, or from a web page that may not ask."""


class UnknownModelError(RequestError):
    """A request for a model that is not served."""


class BodyTooLargeError(RequestError):
    """A request whose body has more bytes than are read."""


class ServiceError(FullStackTransformerError):
    """The service that was called did not answer as it should."""


class ServiceUnavailableError(ServiceError):
    """The service is away or overloaded; the same request may succeed later."""


class ServiceBusyError(ServiceUnavailableError):
    """The queue is full."""

    def __init__(self, message: str, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ServiceRefusedError(ServiceError):
    """The service refused the request and would refuse it again."""
