"""Builds the C++ decoder for each instruction set of this architecture; pyproject.toml has everything else.

The libraries are opened by ctypes, so one wheel fits every version of Python, on its platform. Without a C++
compiler the wheel has none and fits everywhere: PyTorch then generates, more slowly.
"""

import sys
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
NATIVE = Path("full_stack_transformer/generation/runners/native")


class BuildDecoder(Command):
    """A step of `build`, as setuptools' SubCommand describes them."""

    description = "build the C++ decoder"
    user_options = [("build-lib=", "d", "directory to build in")]  # noqa: RUF012 (distutils' own form)
    build_lib: str | None
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = None
        self.made: list[Path] = []

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        # An image installs the dependencies first, without the code.
        if not (ROOT / NATIVE / "decoder.cpp").is_file():
            return
        sys.path.insert(0, str(ROOT))
        # Standard library only: nothing is installed yet.
        from full_stack_transformer.generation.runners.native.library import build_libraries

        assert self.build_lib is not None
        folder = ROOT / NATIVE if self.editable_mode else Path(self.build_lib) / NATIVE
        for isa, outcome in build_libraries(folder).items():
            if isinstance(outcome, Path):
                self.made.append(outcome)
            else:
                self.warn(f"no C++ decoder for {isa}: {outcome}")

    def get_source_files(self) -> list[str]:
        return []  # the wheel's own: pyproject.toml names them

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.made]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """Named by its platform where it has the decoder."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.get_finalized_command("build_decoder").made
        # What chooses between the folders for all platforms and for one.
        self.distribution.has_ext_modules = lambda: not self.root_is_pure  # type: ignore[method-assign]
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


build.sub_commands.append(("build_decoder", None))
setup(cmdclass={"build_decoder": BuildDecoder, "bdist_wheel": PlatformWheel})
