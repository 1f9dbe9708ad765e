"""Builds effllm: calls CMake, which builds by rule (csrc/CMakeLists.txt), into python/effllm/.

Environment: EFFLLM_CUDA (auto, on, off), EFFLLM_ARCHS ("80;90"), EFFLLM_NS, MAX_JOBS.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "python" / "effllm"
# One folder for every kind of call, so that only changed files are compiled.
BUILD = ROOT / "build" / "cmake"


def find_tool(name: str) -> str:
    """The program `name` beside this Python (a venv need not be activated) or on PATH."""
    beside = str(Path(sys.executable).parent)
    path = shutil.which(name, path=beside) or shutil.which(name)
    if path is None:
        sys.exit(f"effllm: {name} is needed to build: pip install {name}")
    return path


class CMakeBuild(build_ext):
    """Builds both op libraries and `_host` in place; for a wheel, copies them into it."""

    def run(self) -> None:
        options = {
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            **{name: value for name, value in os.environ.items() if name.startswith("EFFLLM_")},
        }
        # -U: options of an earlier call must not linger in CMake's cache.
        definitions = ["-UEFFLLM_*", *(f"-D{name}={value}" for name, value in options.items())]
        configure = ["-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "--log-level=NOTICE"]
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        cmake = find_tool("cmake")
        for arguments in ([*configure, *definitions], ["--build", str(BUILD), "-j", jobs]):
            if code := subprocess.call([cmake, *arguments]):
                sys.exit(code)
        if not self.inplace:
            self.copy_into(Path(self.build_lib) / "effllm")

    def copy_into(self, target: Path) -> None:
        """Copies what was built into the package folder of a wheel."""
        host = Path(self.get_ext_filename("_host"))
        for built in (host, *(path.relative_to(PACKAGE) for path in PACKAGE.glob("lib/*"))):
            (target / built).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PACKAGE / built, target / built)


# `depends` puts the sources of the build into the source distribution.
SOURCES = [*ROOT.glob("csrc/**/*"), *ROOT.glob("third_party/**/*"), ROOT / "CMakeLists.txt"]

setup(
    ext_modules=[
        Extension(
            "effllm._host",
            sources=[],
            depends=[str(path.relative_to(ROOT)) for path in SOURCES if path.is_file()],
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
)
