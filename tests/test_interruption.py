"""Ctrl-C at many moments, as a terminal sends it: to the process and to those that it started."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

# Processor time, so that load changes nothing. Before the first, Python itself starts: nothing of ours runs.
_MOMENTS_SECONDS = (0.1, 0.13, 0.17, 0.25, 0.4, 0.7, 1.2)


def _start(*words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "full_stack_transformer", *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def _processor_seconds(process: subprocess.Popen[str]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _interrupt(process: subprocess.Popen[str]) -> tuple[int, int]:
    """The exit code after Ctrl-C, and how often the line is there."""
    with process:
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    return process.returncode, errors.splitlines().count("fst: interrupted")


@pytest.mark.parametrize("command", ["generate", "serve", "train", "tensorboard"])
def test_ctrl_c_is_one_line_whenever_it_comes(
    command: str, model_dir: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    words: dict[str, tuple[str | Path, ...]] = {
        "generate": (model_dir, "--prompt", "a"),
        "serve": (model_dir, "--port", "0"),
        "train": ("--dataset_dir", dataset_dir, "--experiments_root", tmp_path / "experiments"),
        "tensorboard": (tmp_path, "--port", "0"),
    }
    for seconds in _MOMENTS_SECONDS:
        process = _start(command, *words[command])
        deadline = time.monotonic() + 10
        while _processor_seconds(process) < seconds and time.monotonic() < deadline:
            time.sleep(0.005)
        assert _interrupt(process) == (130, 1), seconds
    assert not (tmp_path / "experiments").exists()


def test_the_processes_of_a_preparation_say_nothing_and_end(
    documents_dir: Path, tmp_path: Path
) -> None:
    process = _start(
        *("prepare_dataset", "--documents_train_file", documents_dir, "--num_workers", "5"),
        *(
            "--validation_fraction",
            "0.1",
            "--dataset_name",
            "a",
            "--datasets_root",
            tmp_path,
            "--vocab_size",
            "300",
        ),
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 30
    while len(children.read_text().split()) < 2:  # one tracks resources, the other encodes
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # communicate() returns once nobody holds the other end of standard error.
    assert _interrupt(process) == (130, 1)


def _run(code: str, *, cwd: Path) -> "subprocess.CompletedProcess[str]":
    start = """
        import os, signal, sys, time
        from full_stack_transformer import interruption
        def press():
            os.kill(os.getpid(), signal.SIGINT)
        interruption.end_at_once()
        interruption.raise_where_safe()
        """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
        check=False,
    )


def test_ctrl_c_in_a_destructor_is_not_lost(tmp_path: Path) -> None:
    done = _run(
        """
        class Pressed:
            def __del__(self):
                press()
        try:
            Pressed()
            time.sleep(30)
        except KeyboardInterrupt:
            print("caught")
        """,
        cwd=tmp_path,
    )
    assert (done.stdout, done.stderr) == ("caught\n", "")


def test_an_import_is_finished_first(tmp_path: Path) -> None:
    (tmp_path / "pressed.py").write_text("import __main__\n__main__.press()\ncomplete = True\n")
    done = _run(
        """
        sys.path.insert(0, ".")
        try:
            try:
                import pressed
            except BaseException:
                print("in the import")
            time.sleep(30)
        except KeyboardInterrupt:
            print(pressed.complete)
        """,
        cwd=tmp_path,
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


@pytest.mark.parametrize(
    ("busy", "in_import"),
    [
        ("hashlib.pbkdf2_hmac('sha256', b'', b'', 100_000_000)", False),
        ("time.sleep(30)", True),
    ],
    ids=["native-code", "import"],
)
def test_what_takes_long_is_ended(tmp_path: Path, busy: str, in_import: bool) -> None:
    (tmp_path / "long.py").write_text(f"import hashlib, time\n{busy}\n")
    started = time.monotonic()
    done = _run(
        f"""
        import hashlib, threading
        sys.path.insert(0, ".")
        threading.Timer(0.2, press).start()
        {"import long" if in_import else busy}
        """,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (130, "fst: interrupted\n")
    assert time.monotonic() - started < 20


def test_a_program_that_imports_the_package_keeps_its_own_way(tmp_path: Path) -> None:
    code = (
        "import signal\nbefore = signal.getsignal(signal.SIGINT)\n"
        "from full_stack_transformer.command_line import run\nrun(['--version'])\n"
        "print(signal.getsignal(signal.SIGINT) is before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "True"


def test_a_job_that_a_shell_made_deaf_stays_so() -> None:
    code = (
        "import signal\nfrom full_stack_transformer import interruption\n"
        "interruption.end_at_once()\nprint(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    )
    shell = ["/bin/sh", "-c", 'trap "" INT; exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(shell, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
