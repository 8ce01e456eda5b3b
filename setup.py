"""Packaging: pyproject.toml says what, this file adds the compiled library where it can be built.

`pip install --no-build-isolation .` builds the kernels if nvcc and torch are there and puts them into the wheel, which
then works on every supported Python and torch: py3-none-linux_x86_64. Otherwise the pure Python package is installed,
with a note; all operators then run through PyTorch. FA3_DIST_KERNELS=0 skips the kernels, =1 makes them a must.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))

from build_library import MissingTool, build, facts  # noqa: E402


def build_kernels() -> bool:
    """Builds the library if that is wanted and possible; returns whether there is one to package."""
    wanted = os.environ.get("FA3_DIST_KERNELS", "auto")
    if wanted == "0":
        return False
    try:
        build(os.environ.get("FA3_DIST_ROWS", ""))
    except (MissingTool, subprocess.CalledProcessError) as error:
        if wanted == "1":
            raise
        print(
            f"NOTE: fa3_dist is installed without its compiled kernels: {error}. Everything runs, through PyTorch's "
            "kernels; 'python -m fa3_dist doctor' tells what is missing.",
            file=sys.stderr,
        )
    return facts.LIBRARY.is_file()


class Wheel(bdist_wheel):
    """A wheel for any Python where it carries the library, which links no libpython."""

    def finalize_options(self) -> None:
        self.has_library = build_kernels()
        if self.has_library:
            self.distribution.package_data = {"fa3_dist": ["lib/*.so"]}
            self.distribution.has_ext_modules = lambda: True  # installs into the platform's folder
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        """(python, abi, platform) of the wheel's name."""
        return ("py3", "none", super().get_tag()[2]) if self.has_library else ("py3", "none", "any")


setup(cmdclass={"bdist_wheel": Wheel})
