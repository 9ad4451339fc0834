"""Compiles decoder.cpp once for this processor and opens it. Knows nothing of models.

The library is kept in the user's cache directory. Its name depends on the source with its headers, the
compiler and the processor, so another version or machine compiles again, which takes about 15 seconds.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_float, c_int, c_int32, c_void_p
from functools import cache
from pathlib import Path

from full_stack_transformer.errors import MachineError
from full_stack_transformer.machine import processor_features

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("decoder.cpp")
_FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", "-pthread"),
    # One rounding for a product and a sum only where the source says so: the same bits everywhere.
    "-ffp-contract=off",
)
_NEEDED_FLAGS = {"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"}


class DecoderShape(ctypes.Structure):
    """The sizes of a decoder, as model.h declares them."""

    _fields_ = [
        *(
            (name, c_int32)
            for name in (
                *("num_layers", "hidden_size", "num_heads", "num_key_value_heads", "head_size"),
                *("intermediate_size", "vocab_size", "max_length", "num_slots", "weights_type"),
                *("num_threads", "is_gated", "centers_in_norm", "has_rotary"),
            )
        ),
        ("norm_epsilon", c_float),
        ("attention_scale", c_float),
    ]


def why_not() -> str | None:
    """Why this machine cannot run the decoder; none if it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"it needs Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    missing = _NEEDED_FLAGS - processor_features()
    if missing:
        return f"the processor lacks {', '.join(sorted(missing))}"
    if _compiler() is None:
        return "there is no C++ compiler; install g++"
    return _why_not_compiled()


@cache
def _why_not_compiled() -> str | None:
    """Why the decoder cannot be compiled or opened here; asked once, as compiling takes a while."""
    try:
        load_library()
    except MachineError as error:
        return str(error)
    return None


@cache
def load_library() -> ctypes.CDLL:
    """The compiled decoder, its functions declared.

    Raises:
        MachineError: it cannot be compiled or opened here.
    """
    path = _cache_directory() / f"decoder-{_fingerprint()}.so"
    try:
        if not path.is_file():
            _compile(path)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise MachineError(f"the compiled decoder cannot be kept at {path}: {error}") from error
    values, ids = POINTER(c_float), POINTER(c_int32)
    declarations: dict[str, tuple[list[type], type | None]] = {
        "decoder_new": ([POINTER(DecoderShape)], c_void_p),
        "decoder_delete": ([c_void_p], None),
        "decoder_set_linear": ([c_void_p, c_int, c_int, values, values, c_int, c_int], None),
        "decoder_set_norm": ([c_void_p, c_int, c_int, values, values], None),
        "decoder_set_embeddings": ([c_void_p, values, values], None),
        "decoder_set_rotary": ([c_void_p, values, values], None),
        "decoder_forward": ([c_void_p, c_int, ids, ids, ids, c_int, ids, values], None),
        "decoder_hidden_states": ([c_void_p, values], None),
        "decoder_copy_slot": ([c_void_p, c_int, c_int, c_int], None),
    }
    for name, (arguments, result) in declarations.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def _compile(path: Path) -> None:
    logger.info("compiling the C++ decoder for this processor, once; this takes about 15 seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler = _compiler()
    assert compiler is not None, "the caller asks why_not first"
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        done = subprocess.run(
            [compiler, *_FLAGS, str(_SOURCE), "-o", str(made)], capture_output=True, text=True
        )
        if done.returncode != 0:
            exit_code = f"exit code {done.returncode}"
            lines = done.stderr.splitlines()
            reason = next((line for line in lines if "error" in line), exit_code)
            raise MachineError(f"{compiler} could not compile {_SOURCE.name}: {reason}")
        made.replace(path)


@cache
def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def _fingerprint() -> str:
    parts = tuple(path.read_bytes() for path in (_SOURCE, *sorted(_SOURCE.parent.glob("*.h"))))
    parts = (*parts, *map(str.encode, (*_FLAGS, str(_compiler()), platform.node())))
    parts = (*parts, " ".join(sorted(processor_features())).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "full_stack_transformer"
