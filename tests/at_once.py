# SPDX-License-Identifier: Apache-2.0
"""The same work in several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def at_once(work: Callable[[int], None], count: int = 8) -> None:
    """Call work with 0 to count - 1, each in a thread of its own, all of which wait for the last; what one raises is raised."""
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait()
        work(number)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(run, range(count)))
