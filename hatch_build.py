# SPDX-License-Identifier: Apache-2.0
"""Compiles the CPU kernels when normkit is built or installed, and lets that succeed where there is no compiler."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CpuKernels(BuildHookInterface[Any]):
    """Puts the compiled kernels into the wheel, which is then one for this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; without a compiler the wheel has none, and `normkit info` says so."""
        if self.target_name != "wheel":
            return
        # by its path: normkit itself may not be imported before it has been installed
        spec = spec_from_file_location("normkit_cpu_build", Path(self.root) / "normkit" / "cpu" / "build.py")
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        try:
            library = module.build()
        except (module.BuildError, OSError) as error:
            module.LIBRARY.unlink(missing_ok=True)
            self.app.display_warning(f"normkit is built without its CPU kernels: {error}")
            return
        build_data["artifacts"].append(f"/normkit/cpu/{library.name}")
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
