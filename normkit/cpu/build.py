# SPDX-License-Identifier: Apache-2.0
"""Compile the kernels next to their source: `python -m normkit.cpu.build`, with $CXX or the first C++ compiler found.

Runs where nothing of normkit is installed yet, so it imports the standard library alone.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
# not with the suffix of an extension module, which it is not
LIBRARY = HERE / "_kernels.lib"

# A product and a sum never become one operation that rounds once, so that every level has the same bits.
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra", "-Wno-psabi"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
_LEVELS = {
    "LEVEL_BASELINE": (),
    "LEVEL_AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "LEVEL_AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
}


def digest() -> str:
    """Return what tells these sources from others, whose calls may be packed otherwise."""
    sources = sorted(path for path in HERE.iterdir() if path.suffix in (".cpp", ".hpp"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


class BuildError(Exception):
    """The kernels could not be compiled; the message says why."""


def compiler() -> list[str]:
    """Return the command of the C++ compiler.

    Raises:
        BuildError: there is none.
    """
    asked = shlex.split(os.environ.get("CXX", ""))
    for command in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler: {asked[0] if asked else 'c++, g++ and clang++'} not found")


def build(extra: Sequence[str] = (), library: Path = LIBRARY) -> Path:
    """Compile the kernels and return the library.

    Args:
        extra: more flags for the compiler and the linker, such as those of a sanitizer.
        library: where to put it.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    command = compiler()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    common = [*_FLAGS, *(["-DNORMKIT_X86"] if x86 else []), *extra]
    units: list[tuple[str, tuple[str, ...]]] = [
        ("kernels.cpp", (f'-DDIGEST="{digest()}"',)),
        ("threads.cpp", ()),
        ("ffi.cpp", ()),
        ("callback.cpp", ()),
        ("prepared.cpp", ()),
    ]
    units += [("rows.cpp", (f"-DLEVEL={name}", *flags)) for name, flags in _LEVELS.items() if x86 or not flags]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = [str(Path(folder) / f"{number}.o") for number in range(len(units))]

        def compile_unit(number: int) -> None:
            source, flags = units[number]
            _run([*command, *common, *flags, "-c", str(HERE / source), "-o", objects[number]])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_unit, range(len(units))))
        linked = Path(folder) / library.name
        # prepared.cpp calls Python, which is there only when the library is loaded
        later = ("-Wl,-undefined,dynamic_lookup",) if sys.platform == "darwin" else ()
        _run([*command, *common, "-shared", *later, *objects, "-o", str(linked)])
        # in one step, so that a process which has the old library open keeps it
        linked.replace(library)
    return library


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")


if __name__ == "__main__":
    try:
        print(build(sys.argv[1:]))
    except BuildError as error:
        sys.exit(str(error))
