"""`fst tensorboard`: show the curves of all experiments in a browser."""

import logging
import signal
import sys

from full_stack_transformer.arguments.training import TensorboardArguments
from full_stack_transformer.errors import InputError


def main(arguments: TensorboardArguments) -> int:
    """Run TensorBoard in this process, until Ctrl-C or SIGTERM.

    Raises:
        InputError: there is no directory of experiments.
        KeyboardInterrupt: by Ctrl-C, which TensorBoard's server takes for its end.
    """
    if not arguments.experiments_root.is_dir():
        raise InputError(
            f"{arguments.experiments_root} does not exist; expected the directory of experiments that "
            "fst train writes (--experiments_root)"
        )
    from tensorboard import default, program

    logging.getLogger("tensorboard").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    board = program.TensorBoard(plugins=default.get_plugins())
    # It would announce the signal.
    board._install_signal_handler = lambda *_: None
    words = ("--logdir", str(arguments.experiments_root), "--host", arguments.host)
    board.configure(("tensorboard", *words, "--port", str(arguments.port)))
    exit_code = int(board.main())
    if exit_code == 0:
        raise KeyboardInterrupt
    return 1
