# SPDX-License-Identifier: Apache-2.0
"""The JAX training example on eight virtual devices: it learns, and what the devices tell each other is the gradients only.

JAX fixes the number of devices when it starts, so `measure` runs in a process of its own: this module, as a program.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normkit.demo import load_example
from normkit.tolerance import UNIT_ROUNDOFF, sum_error

DEVICES, ROWS = 8, 32


def measure() -> dict[str, Any]:
    """Run the example's main, its gradients on one device and on all, and the compiler on its step."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    example: Any = load_example("jax_train")
    state, ids = example.init(jax.random.key(1)), example.batch(jax.random.key(2), ROWS)
    mesh = Mesh(jax.devices(), ("data",))
    spread, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    sharded = jax.device_put(state, everywhere), jax.device_put(ids, spread)

    gradient = jax.jit(jax.grad(example.loss_of))
    of_each_row = jax.jit(jax.vmap(jax.grad(example.loss_of), in_axes=(None, 0)))(state.model, ids[:, None])
    summed = [np.abs(leaf).mean(axis=0) for leaf in jax.tree.leaves(of_each_row)]
    alone, together = (jax.tree.leaves(gradient(*of)) for of in ((state.model, ids), (sharded[0].model, sharded[1])))
    norm = np.linalg.norm
    printed = io.StringIO()
    sys.argv = ["jax_train.py", "--steps", "41", "--rows", str(ROWS)]
    with contextlib.redirect_stdout(printed):
        example.main()
    return {
        "devices": len(together[0].sharding.device_set),
        "errors": [float(norm(a - b) / norm(of)) for a, b, of in zip(alone, together, summed, strict=True)],
        "losses": [float(loss) for loss in re.findall(r"loss (\S+)", printed.getvalue())],
        "program": example.train.lower(*sharded).compile().as_text(),
        "parameters": sum(leaf.size for leaf in alone),
    }


@pytest.fixture(scope="module")
def measured() -> Any:
    pytest.importorskip("jax")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "tests.test_jax_train"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_loss_falls(measured: Any) -> None:
    chance = math.log(load_example("jax_train").VOCABULARY)
    first, *_, last = measured["losses"]
    assert first > 0.9 * chance
    assert last < 0.5 * chance


def test_sharded_gradients_are_those_of_one_device(measured: Any) -> None:
    """They differ by the order of their sums over the tokens of all rows: by little, relative to what is summed."""
    length = load_example("jax_train").LENGTH
    assert measured["devices"] == DEVICES
    assert max(measured["errors"]) <= sum_error(ROWS * 2 * length, UNIT_ROUNDOFF["float32"])
    assert max(measured["errors"]) > 0


def test_only_gradients_and_the_loss_are_communicated(measured: Any) -> None:
    pattern = r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)(?:-start)?\("
    communicated = re.findall(pattern, measured["program"])
    assert {operation for _, operation in communicated} == {"all-reduce"}
    shapes = re.findall(r"f32\[([\d,]*)\]", " ".join(result for result, _ in communicated))
    sizes = [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]
    assert sum(sizes) == measured["parameters"] + 1


if __name__ == "__main__":
    print(json.dumps(measure()))
