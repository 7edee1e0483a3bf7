# SPDX-License-Identifier: Apache-2.0
"""A description of NVIDIA H200 GPUs, from public figures, for XLA to compile for where there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

CONFIG = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


def mesh(devices: int, axis_type: Any) -> Any:
    """Return a mesh of H200 GPUs that are not there, with one axis "d"; skip the test where XLA for CUDA is not installed."""
    import jax
    from jax.experimental import topologies

    for name in ("jax_cuda13_plugin", "jax_plugins.xla_cuda13"):
        pytest.importorskip(name, reason=f"{name} is not installed; tests/test_jax_versions.py runs this where it is")
    topology = topologies.get_topology_desc(platform="cuda", target_config=CONFIG, topology=f"1x1x{devices}")
    return jax.sharding.Mesh(np.array(topology.devices), ("d",), axis_types=(axis_type,))
