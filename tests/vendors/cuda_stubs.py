# SPDX-License-Identifier: Apache-2.0
"""Makes stand-ins for NVIDIA's libraries, so that a torch built for CUDA can be imported without them: 3 GB less to install.

Usage: python cuda_stubs.py DIRECTORY_OF_LIBTORCH
Every function of a stand-in returns 100, which is cudaErrorNoDevice: torch then finds no GPU. Needs gcc and binutils.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

NVIDIA = re.compile(r"lib(cu|nccl|nv)")
FUNCTION = re.compile(r"_{0,2}(cu|nccl|pnccl|nv)")


def output(*command: object) -> str:
    """Run a command, and return what it printed."""
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def missing_libraries(libraries: list[Path]) -> set[str]:
    """Return the names of NVIDIA's libraries that others need and that do not lie beside them."""
    dynamic = "".join(output("readelf", "--dynamic", "--wide", library) for library in libraries)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    return {name for name in needed if NVIDIA.match(name)} - {library.name for library in libraries}


def wanted_functions(libraries: list[Path]) -> dict[str, set[str]]:
    """Return for each symbol version the functions that are asked for with it; "" has those without a version."""
    functions = defaultdict(set)
    for library in libraries:
        for line in output("nm", "--dynamic", "--undefined-only", "--with-symbol-versions", library).splitlines():
            name, _, version = line.split()[-1].partition("@")
            if FUNCTION.match(name):
                functions[version.lstrip("@")].add(name)
    return functions


def build(path: Path, functions: dict[str, set[str]]) -> None:
    """Compile a library with these functions, by their versions."""
    source, versions = path.with_suffix(".c"), path.with_suffix(".map")
    names = sorted(set[str]().union(*functions.values()))
    source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in names))
    versioned = {version: members for version, members in functions.items() if version}
    versions.write_text(
        "".join(
            f"{version} {{ global: {' '.join(f'{name};' for name in sorted(members))} }};\n"
            for version, members in versioned.items()
        )
    )
    script = [f"-Wl,--version-script={versions}"] if versioned else []
    output("gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{path.name}", *script, "-o", path, source)
    source.unlink()
    versions.unlink()


def main(directory: Path) -> None:
    """Make every library that is missing; a version bears the name of its library, and the rest goes to the first."""
    libraries = sorted(directory.glob("lib*.so"))
    functions = wanted_functions(libraries)
    missing = sorted(missing_libraries(libraries))
    for name in missing:
        own = {version: members for version, members in functions.items() if version == name}
        build(directory / name, own | ({"": functions[""]} if name == missing[0] else {}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
