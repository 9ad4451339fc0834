"""`fst tensorboard`: show the curves of all experiments in a browser."""

import logging
import subprocess
import sys

from full_stack_transformer.arguments import TensorboardArguments
from full_stack_transformer.errors import InputError

logger = logging.getLogger(__name__)


def show_curves(arguments: TensorboardArguments) -> int:
    """Run TensorBoard until Ctrl-C and return its exit code."""
    if not arguments.experiments_root.is_dir():
        raise InputError(
            f"{arguments.experiments_root} does not exist; expected the directory of experiments that "
            "fst train writes (--experiments_root)"
        )
    try:
        return subprocess.run(tensorboard_command(arguments), check=False).returncode
    except KeyboardInterrupt:
        return 0


def tensorboard_command(arguments: TensorboardArguments) -> list[str]:
    """The command line of the process that serves the curves."""
    return [
        *(sys.executable, "-m", "tensorboard.main"),
        *("--logdir", str(arguments.experiments_root)),
        *("--host", arguments.host),
        *("--port", str(arguments.port)),
    ]
