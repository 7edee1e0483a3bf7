# SPDX-License-Identifier: Apache-2.0
"""Where modules take their weights from: anything with `get_tensor(name)`, a mapping, or safetensors files."""

from __future__ import annotations

import importlib
import os
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, cast

from .errors import CheckpointError, DeviceError, MissingPackageError, MissingTensorError, OptionError

FilePath = str | os.PathLike[str]

_FRAMEWORKS = ("numpy", "torch", "jax")


class Weights(Protocol):
    """What `load` needs of a checkpoint: a tensor for a name."""

    def get_tensor(self, name: str) -> Any:
        """Return the tensor called `name`, or raise an error that says it is missing."""


class MappingWeights:
    """Weights in a mapping from name to tensor, such as a state dict.

    Args:
        mapping: The tensors by name; it is not copied.

    Example:
        >>> MappingWeights({"model.norm.weight": [1.0, 2.0]}).get_tensor("model.norm.weight")
        [1.0, 2.0]
    """

    def __init__(self, mapping: Mapping[str, Any]) -> None:
        self._mapping = mapping

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors."""
        return tuple(self._mapping)

    def get_tensor(self, name: str) -> Any:
        """Return the tensor called `name`.

        Args:
            name: The full name, such as "model.layers.0.input_layernorm.weight".

        Returns:
            The tensor as it is in the mapping.

        Raises:
            MissingTensorError: There is no such name; the message has the closest names that exist.
        """
        # Not a membership test: a mapping may make values on demand, as a defaultdict or a lazy loader does.
        try:
            return self._mapping[name]
        except KeyError:
            raise _missing(name, self._mapping.keys(), "this mapping") from None


class SafetensorsWeights:
    """Weights in one or several safetensors files. No other format is read: a pickle could run code.

    Every file's header is checked at once; tensors are read when they are asked for.

    Args:
        paths: A file, several (the shards of a checkpoint), or a folder, which stands for all *.safetensors in it.
        framework: What `get_tensor` returns: "numpy" (the default), "torch" or "jax" arrays.
        device: Where tensors go: a torch device or its name for "torch", a jax.Device for "jax"; None is the
            CPU in torch and the default device in JAX.

    Raises:
        CheckpointError: A file is missing, is not safetensors or is truncated, or two files hold the same name.
        OptionError: The framework is not one of the three.
        DeviceError: The device is none that this framework can use here.
        MissingPackageError: The package safetensors, or the framework, is not installed.

    Example:
        >>> import tempfile, numpy as np
        >>> from safetensors.numpy import save_file
        >>> path = f"{tempfile.mkdtemp()}/model.safetensors"
        >>> save_file({"norm.weight": np.ones(2, np.float32)}, path)
        >>> SafetensorsWeights(path).get_tensor("norm.weight")
        array([1., 1.], dtype=float32)
    """

    def __init__(self, paths: FilePath | Iterable[FilePath], framework: str = "numpy", device: object | None = None) -> None:
        if framework not in _FRAMEWORKS:
            raise OptionError(f"framework={framework!r} is unknown; it can be {', '.join(map(repr, _FRAMEWORKS))}")
        safetensors = _import("safetensors", "SafetensorsWeights")
        _check_device(framework, device)
        self._framework, self._device = framework, device
        self._handles: dict[str, Any] = {}
        origin: dict[str, Path] = {}
        for path in _files(paths):
            handle = _open(safetensors, path, framework, device)
            for name in handle.keys():  # noqa: SIM118 (a handle is not iterable itself)
                if name in origin:
                    raise CheckpointError(f"tensor {name!r} is in two files, {origin[name]} and {path}; pass only one")
                origin[name], self._handles[name] = path, handle
        self._source = ", ".join(sorted({str(path) for path in origin.values()})) or "the given files"

    def __repr__(self) -> str:
        return f"SafetensorsWeights({len(self._handles)} tensors of {self._source}, framework={self._framework!r})"

    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors."""
        return tuple(self._handles)

    def get_tensor(self, name: str) -> Any:
        """Read the tensor called `name`.

        Args:
            name: The full name, such as "model.layers.0.input_layernorm.weight".

        Returns:
            A new array of the framework, in the file's dtype.

        Raises:
            MissingTensorError: No file holds this name; the message has the closest names that exist.
        """
        if name not in self._handles:
            raise _missing(name, self._handles.keys(), self._source)
        tensor = self._handles[name].get_tensor(name)
        if self._framework != "jax":
            return tensor
        jax = importlib.import_module("jax")
        return jax.device_put(tensor, self._device)


def as_weights(weights: object) -> Weights:
    """Return `weights` as an object with `get_tensor(name)`.

    Args:
        weights: Anything that has `get_tensor`, or a mapping.

    Returns:
        The same object, whose own error for a missing name reaches the caller, or a `MappingWeights`.

    Raises:
        CheckpointError: It is neither.

    Example:
        >>> as_weights({"norm.weight": 1.0}).get_tensor("norm.weight")
        1.0
    """
    if callable(getattr(weights, "get_tensor", None)):
        return cast(Weights, weights)
    if isinstance(weights, Mapping):
        return MappingWeights(weights)
    hint = f"; for files use SafetensorsWeights({str(weights)!r})" if isinstance(weights, str | os.PathLike) else ""
    raise CheckpointError(
        f"weights must be a mapping from name to tensor or have get_tensor(name), got {type(weights).__name__}{hint}"
    )


def _missing(name: str, names: Collection[str], source: str) -> MissingTensorError:
    closest = get_close_matches(name, names, n=3)
    known = f"the closest names are {', '.join(map(repr, closest))}" if closest else "no name is close to it"
    return MissingTensorError(f"tensor {name!r} is not in {source}; of its {len(names)} names {known}")


def _import(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(f"{purpose} needs the package {module}: pip install {module} ({error})") from error


def _check_device(framework: str, device: object | None) -> None:
    if framework == "numpy":
        if device is not None and str(device) != "cpu":
            raise DeviceError(f'framework="numpy" lives on the CPU, got device={device!r}; leave device out')
        return
    module = _import(framework, f'framework="{framework}"')
    if device is None:
        return
    try:
        if framework == "torch":
            module.empty(0, device=device)
        else:
            module.device_put(0, device)
    # torch raises AssertionError for a device type its build lacks, ValueError or TypeError come from JAX.
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise DeviceError(f"device={device!r} cannot be used with {framework} here: {error}") from error


def _files(paths: FilePath | Iterable[FilePath]) -> list[Path]:
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not given:
        raise CheckpointError("paths is empty; pass a *.safetensors file, several, or a folder of them")
    files: list[Path] = []
    for path in map(Path, given):
        found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not found:
            raise CheckpointError(f"folder {path} holds no *.safetensors file; no other format is read")
        files += found
    return files


def _open(safetensors: Any, path: Path, framework: str, device: object | None) -> Any:
    # A missing file is left to open(): its message differs between versions of safetensors.
    if not path.is_file():
        raise CheckpointError(f"cannot read {path}: there is no such file")
    # NumPy knows the name "bfloat16" only once ml_dtypes has been imported.
    importlib.import_module("ml_dtypes")
    kind = {"framework": "pt", "device": str(device or "cpu")} if framework == "torch" else {"framework": "np"}
    try:
        return safetensors.safe_open(str(path), **kind)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except safetensors.SafetensorError as error:
        reason = "it is truncated or damaged" if "incomplete" in str(error) else "it is not a whole safetensors file"
        raise CheckpointError(f"cannot read {path}: {reason} ({error}); download it again or convert it") from error
