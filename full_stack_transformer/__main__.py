"""`fst`: decides what Ctrl-C does, and only then imports the rest.

Knows no command: `command_line.py` has the table.
"""

import io
import sys
from collections.abc import Sequence

from full_stack_transformer import interruption

_TRAINING_COMMANDS = ("train", "run_experiment", "plan")
# With one of them nothing is trained.
_SHOWS_OPTIONS = {"--help", "-h", "--show_all_args"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and leave with its exit code."""
    interruption.end_at_once()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not be UTF-8
    words = list(sys.argv[1:] if argv is None else argv)
    # Imported here: what Ctrl-C does is decided by now.
    from full_stack_transformer.own_classes import leave_working_directory

    leave_working_directory()
    from full_stack_transformer.machine import prepare_libraries, restart_with_kept_memory

    prepare_libraries()
    if (
        words[:1]
        and words[0].replace("-", "_") in _TRAINING_COMMANDS
        and not _SHOWS_OPTIONS & {*words}
    ):
        with interruption.held():
            restart_with_kept_memory(words)
    from full_stack_transformer.command_line import run

    try:
        exit_code = run(words)
    except KeyboardInterrupt:  # a second one, while the first was reported
        exit_code = interruption.EXIT_CODE
    finally:
        interruption.end_at_once()
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
