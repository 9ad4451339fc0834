"""Opens the C++ decoder for this processor. Knows nothing of models.

The package carries a library for each instruction set of its architecture, which setup.py builds with the
functions of this module. A library's name depends on its source, so none is used with another version of it.
Where there is none but a compiler, the one that is needed is compiled into the user's cache directory.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, c_bool, c_double, c_float, c_int, c_int32, c_int64, c_uint8, c_void_p
from functools import cache
from pathlib import Path

from full_stack_transformer.errors import MachineError
from full_stack_transformer.machine import instruction_sets, num_cores

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCE = _FOLDER / "decoder.cpp"
# Where setup.py puts the libraries.
_PREBUILT = _FOLDER
_FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"),
    # One rounding for a product and a sum only where the source says so: the same bits everywhere.
    "-ffp-contract=off",
    # Numbers of 32 bits are stored and loaded as other types, and integers may wrap.
    *("-fno-strict-aliasing", "-fwrapv"),
)
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512")
_X86 = {
    "avx512_bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
    "avx512_vnni": (*_AVX512, "-mavx512vnni"),
    "avx512": _AVX512,
    "avx_vnni": ("-mavx2", "-mfma", "-mavxvnni"),
    "avx2": ("-mavx2", "-mfma"),
    "plain": (),
}
_ARM: dict[str, tuple[str, ...]] = {"neon": ("-march=armv8.2-a+dotprod",), "plain": ()}
# Architecture -> its instruction sets -> what the compiler is told.
_TARGETS = {"x86_64": _X86, "aarch64": _ARM, "arm64": _ARM}
_DIGEST_BYTES = 32


class DecoderShape(ctypes.Structure):
    """The sizes of a decoder, as model.h declares them."""

    _fields_ = [
        *(
            (name, c_int32)
            for name in (
                *("num_layers", "hidden_size", "num_heads", "num_key_value_heads", "head_size"),
                *("intermediate_size", "vocab_size", "max_length", "num_blocks", "block_size"),
                *("weights_type", "kv_type", "num_threads"),
                *("activation", "is_gated", "is_parallel", "centers_in_norm", "adapter_bits"),
            )
        ),
        *(
            (name, c_float)
            for name in (
                *("norm_epsilon", "attention_scale", "embedding_scale", "residual_scale"),
                *("logit_scale", "attention_cap", "logit_cap"),
            )
        ),
    ]


class Library(ctypes.CDLL):
    """The decoder's functions."""

    isa: str
    """What it was compiled for."""


def targets() -> dict[str, tuple[str, ...]]:
    """Instruction sets of this architecture, best first -> flags of the compiler."""
    return _TARGETS.get(platform.machine(), {"plain": ()})


def why_not() -> str | None:
    """Why this machine cannot run the decoder; none if it can.

    Raises:
        MachineError: FST_ISA asks for what the processor lacks, or the library is damaged.
    """
    return _found(instruction_sets())[1]


def load_library(isa: str | None = None) -> Library:
    """The decoder, its functions declared.

    Args:
        isa: of `machine.INSTRUCTION_SETS`; none for the best of this machine.

    Raises:
        MachineError: there is none, it cannot be compiled, or it is damaged.
    """
    library, problem = _found((isa,) if isa else instruction_sets())
    if library is None:
        raise MachineError(f"the C++ decoder cannot run here: {problem}")
    return library


@cache
def _found(isas: tuple[str, ...]) -> tuple[Library | None, str | None]:
    """The library of the first of the instruction sets that there is one for, or why there is none."""
    names = {isa: file_name(isa) for isa in isas if isa in targets()}
    if not names:
        return None, f"it knows no {', '.join(isas)} on {platform.machine()}"
    best = next(iter(names))
    compiler = _compiler()
    problem = (
        "this installation has no library of it, and there is no C++ compiler; install g++, or a wheel "
        "that was built with one"
    )
    for isa, name in names.items():
        for folder in (_PREBUILT, _cache_folder()):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                return _open(folder / name, isa), None
        # One for a lesser instruction set may be there; it is slower.
        if isa == best and compiler is not None:
            logger.info("compiling the C++ decoder for %s, once; this takes some 10 seconds", isa)
            try:
                _compile(compiler, isa, _cache_folder() / name)
            except (MachineError, OSError) as error:
                problem = str(error)
            else:
                return _open(_cache_folder() / name, isa), None
    return None, problem


def _open(path: Path, isa: str) -> Library:
    content = path.read_bytes()
    if hashlib.sha256(content[:-_DIGEST_BYTES]).digest() != content[-_DIGEST_BYTES:]:
        advice = "install the package again" if path.parent == _PREBUILT else "delete it"
        raise MachineError(f"the library of the C++ decoder at {path} is damaged; {advice}")
    try:
        library = Library(str(path))
    except OSError as error:
        raise MachineError(f"the library of the C++ decoder cannot be opened: {error}") from error
    values, ids, codes = POINTER(c_float), POINTER(c_int32), POINTER(c_uint8)
    declarations: dict[str, tuple[list[type], type | None]] = {
        "decoder_new": ([POINTER(DecoderShape)], c_void_p),
        "decoder_delete": ([c_void_p], None),
        "decoder_set_linear": ([c_void_p, c_int, c_int, values, values, c_int, c_int], c_bool),
        "decoder_set_codes": (
            [c_void_p, c_int, c_int, *(codes,) * 3, values, values, c_int, c_int],
            c_bool,
        ),
        "decoder_set_norm": ([c_void_p, c_int, c_int, values, values, c_int], None),
        "decoder_set_layer": ([c_void_p, c_int, c_int, c_int], None),
        "decoder_set_embeddings": ([c_void_p, values, values], c_bool),
        "decoder_add_rotary": ([c_void_p, values, c_int, c_float], None),
        "decoder_add_adapter": ([c_void_p, c_int, c_int64], c_bool),
        "decoder_remove_adapter": ([c_void_p, c_int], None),
        "decoder_set_low_rank": (
            [c_void_p, c_int, c_int, c_int, values, values, ids, ids, c_int, c_int],
            c_bool,
        ),
        "decoder_forward": ([c_void_p, c_int, *[ids] * 6, c_int, ids, values], c_bool),
        "decoder_hidden_states": ([c_void_p, values], c_bool),
        "sampler_rank": ([values, c_int, c_float, c_int, values, ids, POINTER(c_double)], None),
        "sampler_draw": ([values, c_int, c_float, c_double], c_int),
    }
    for name, (arguments, result) in declarations.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    library.isa = isa
    return library


# ------------------------------------------------------------------ building


def build_libraries(folder: Path) -> dict[str, Path | str]:
    """Build the libraries of this architecture, in as many processes as there are cores.

    Args:
        folder: gets them; older ones in it are deleted.

    Returns:
        For each instruction set where its library is, or why it could not be built.
    """
    compiler = _compiler()
    if compiler is None:
        return dict.fromkeys(targets(), "there is no C++ compiler; install g++")
    paths = {isa: folder / file_name(isa) for isa in targets()}
    for old in set(folder.glob("decoder-*.so")) - set(paths.values()):
        old.unlink()

    def build(isa: str) -> Path | str:
        try:
            if not paths[isa].is_file():
                _compile(compiler, isa, paths[isa])
        except (MachineError, OSError) as error:
            return str(error)
        return paths[isa]

    with ThreadPoolExecutor(num_cores()) as pool:
        return dict(zip(paths, pool.map(build, paths), strict=True))


def file_name(isa: str) -> str:
    """Name of the library for an instruction set of this architecture, built from this source."""
    sources = (_SOURCE, *sorted(_FOLDER.glob("*.h")))
    parts = [*(path.read_bytes() for path in sources), *map(str.encode, _flags(isa))]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]
    return f"decoder-{platform.machine()}-{isa}-{digest}.so"


def _flags(isa: str) -> Iterable[str]:
    # Runs also where the system's own libraries of the compiler are older.
    linked = ("-static-libstdc++", "-static-libgcc") if platform.system() == "Linux" else ()
    # `make test-sanitizers` adds its own.
    added = os.environ.get("FST_CXXFLAGS", "").split()
    return (*_FLAGS, *linked, *targets()[isa], *added)


def _compile(compiler: str, isa: str, path: Path) -> None:
    """Write the library and, behind its end, its checksum.

    Raises:
        MachineError: the compiler fails.
        OSError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            command = [compiler, *_flags(isa), str(_SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                exit_code = f"exit code {done.returncode}"
                lines = done.stderr.splitlines()
                reason = next((line for line in lines if "error" in line), exit_code)
                raise MachineError(
                    f"{compiler} could not compile {_SOURCE.name} for {isa}: {reason}"
                )
            content = made.read_bytes()
            made.write_bytes(content + hashlib.sha256(content).digest())
            made.replace(path)
    except OSError as error:
        raise OSError(f"the compiled decoder cannot be kept at {path}: {error}") from error


@cache
def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def _cache_folder() -> Path:
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without home, as in some containers: nothing can be kept
        root = os.devnull
    return Path(root) / "full_stack_transformer"
