# SPDX-License-Identifier: Apache-2.0
"""What times depend on besides the code: versions, processor, threads, the allocator's variables, commit and date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from .. import __version__
from ..errors import OptionError, UnsupportedError
from ..vendors import ipex, vllm

ALLOCATOR = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
"""Variables of glibc's allocator, which say whether large results are fresh memory at each call."""

_DISTRIBUTIONS = {
    "numpy": ("numpy",),
    "torch": ("torch",),
    "triton": ("triton",),
    "jax": ("jax",),
    "vllm": vllm.DISTRIBUTIONS,
    "ipex": (ipex.DISTRIBUTION,),
    "liger": ("liger-kernel",),
    "quack": ("quack-kernels",),
    "flash_attn": ("flash-attn",),
    "flashinfer": ("flashinfer-python",),
}
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_CACHE = 32 * 2**20
_ROOT = Path(__file__).parents[2]


def collect() -> dict[str, str]:
    """Return the circumstances by name of their column; "" for what there is not."""
    found = {"normkit": __version__, "python": platform.python_version()}
    found |= {name: _version(distributions) for name, distributions in _DISTRIBUTIONS.items()}
    found |= {"processor": processor(), "processors": str(processors()), "torch_threads": torch_threads()}
    found |= {"cache_mib": f"{cache_bytes() / 2**20:g}"}
    found |= {name: os.environ.get(name, "") for name in ALLOCATOR}
    date = datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds")
    return found | {"system": platform.platform(), "commit": commit(), "date": date}


def limit_threads(count: int) -> None:
    """Give this process so many of its processors, before a framework is loaded: each starts as many threads.

    Raises:
        OptionError: it has not so many.
        UnsupportedError: the system cannot do that.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise UnsupportedError(f"--threads needs os.sched_setaffinity, which Python on {platform.system()} does not have")
    available = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(available):
        raise OptionError(f"--threads must be from 1 to {len(available)}, the processors of this process; got {count}")
    os.sched_setaffinity(0, available[:count])
    if find_spec("torch"):
        import_module("torch").set_num_threads(count)


def processor() -> str:
    """Return the name of the processor."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def torch_threads() -> str:
    """Return how many threads torch uses."""
    return str(import_module("torch").get_num_threads()) if find_spec("torch") else ""


def cache_bytes() -> int:
    """Return the size of the largest cache of a processor; where the system does not say, 32 MiB are assumed."""
    sizes = [file.read_text(encoding="ascii").strip() for file in _CACHES.glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=_USUAL_CACHE)


def commit() -> str:
    """Return the commit of the checkout that this runs from, with "-dirty" if files were changed; "" outside of one."""
    if not (_ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # there is no git
        return ""


def _version(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""
