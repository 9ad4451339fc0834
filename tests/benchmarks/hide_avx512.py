"""A copy of OpenVINO that cannot see AVX-512, so that it can be measured as processors without it run it.

python tests/benchmarks/hide_avx512.py PEER_PYTHON OUT
LD_PRELOAD=OUT/hide_avx512.so PYTHONPATH=OUT FST_ISA=avx2 python tests/benchmarks/generation.py

OpenVINO asks the processor itself (CPUID) and has no setting to hold it back; with oneDNN's alone it dies. In
the copy each of those instructions is a breakpoint, which hide_avx512.c answers. Where they are comes from
objdump. Needs binutils and a C compiler; takes a minute and 150 MB.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CPUID, BREAKPOINT = b"\x0f\xa2", b"\xcc\x90"
LIBRARIES = ("libopenvino.so.*", "libopenvino_intel_cpu_plugin.so")


def _said(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def _places(library: Path) -> list[int]:
    """Offsets in the file of its CPUID instructions."""
    segments = [
        tuple(int(number, 16) for number in found)
        for found in re.findall(
            r"LOAD\s+0x(\w+)\s+0x(\w+)\s+\S+\s+0x(\w+)", _said("readelf", "-lW", str(library))
        )
    ]
    command = ["objdump", "-d", "--no-show-raw-insn", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listing:
        assert listing.stdout is not None
        # One by one: a listing has gigabytes.
        addresses = [
            int(line.split(":")[0], 16) for line in listing.stdout if line.endswith("\tcpuid\n")
        ]
    return [
        address - start + offset
        for address in addresses
        for offset, start, size in segments
        if start <= address < start + size
    ]


def _hide(library: Path) -> int:
    """Put a breakpoint for each of them; returns their number."""
    content = bytearray(library.read_bytes())
    places = _places(library)
    for place in places:
        assert content[place : place + 2] == CPUID, f"{library}: no such instruction at {place:#x}"
        content[place : place + 2] = BREAKPOINT
    library.write_bytes(content)
    return len(places)


def main() -> None:
    """Copy, change and compile."""
    python, out = sys.argv[1], Path(sys.argv[2])
    code = "import openvino, pathlib; print(pathlib.Path(openvino.__file__).parent)"
    package = Path(_said(python, "-c", code).strip())
    copy = out / package.name
    shutil.copytree(package, copy)
    for pattern in LIBRARIES:
        for library in (copy / "libs").glob(pattern):
            print(f"{library.name}: {_hide(library)} instructions")
    target = out / "hide_avx512.so"
    _said("cc", "-O2", "-shared", "-fPIC", str(HERE / "hide_avx512.c"), "-o", str(target))
    print(f"LD_PRELOAD={target} PYTHONPATH={out}")


if __name__ == "__main__":
    main()
