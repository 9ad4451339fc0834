"""`fst tensorboard`: show the curves of all experiments in a browser."""

import os
import sys
from typing import NoReturn

from full_stack_transformer.arguments.training import TensorboardArguments
from full_stack_transformer.errors import InputError


def main(arguments: TensorboardArguments) -> NoReturn:
    """Become TensorBoard, until Ctrl-C.

    Raises:
        InputError: there is no directory of experiments.
    """
    if not arguments.experiments_root.is_dir():
        raise InputError(
            f"{arguments.experiments_root} does not exist; expected the directory of experiments that "
            "fst train writes (--experiments_root)"
        )
    command = [
        *(sys.executable, "-m", "tensorboard.main"),
        *("--logdir", str(arguments.experiments_root)),
        *("--host", arguments.host, "--port", str(arguments.port)),
    ]
    # In the place of this process, so that a signal to it reaches TensorBoard and leaves no orphan.
    os.execv(sys.executable, command)  # noqa: S606 (no shell, our own words)
