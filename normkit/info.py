# SPDX-License-Identifier: Apache-2.0
"""`normkit info`: what is installed, what each front end would choose here and why, and whether that computes rightly.

Nothing here raises: a framework that is installed but broken is reported with its error.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import numpy as np

from . import tolerance
from .registry import Verdict
from .spec import NormSpec, Operand, describe

T = TypeVar("T")

PACKAGES = ("normkit", "numpy", "ml_dtypes", "torch", "jax", "triton")
"""The packages whose versions are reported."""

VENDORS = ("vllm", "ipex")
"""The modules of `normkit.vendors` that are reported."""

SHAPE = (4, 256)
"""Shape of the typical problem: add_rms_norm of float32 arrays with a weight."""


@dataclass(frozen=True)
class Package:
    """A package: its version, or what went wrong when it was imported; with neither it is not installed."""

    name: str
    version: str | None
    problem: str | None


@dataclass(frozen=True)
class Trial:
    """One implementation on the typical problem.

    Attributes:
        verdict: accepted, or the reason why not.
        error: the largest error of its results, in units of the derived bound; None if it was not run.
        problem: what went wrong, None if nothing did.
    """

    verdict: Verdict
    error: float | None
    problem: str | None


@dataclass(frozen=True)
class Check:
    """One front end on one device.

    Attributes:
        framework: "numpy", "torch" or "jax".
        device: as the framework names it.
        trials: every implementation, in the order in which they are tried; the first one accepted is the choice.
        problem: what went wrong before any implementation could be tried, None if nothing did.
    """

    framework: str
    device: str
    trials: tuple[Trial, ...]
    problem: str | None


@dataclass(frozen=True)
class Vendor:
    """A vendor's library.

    Attributes:
        name: of the implementation.
        version: of the library, None if it is not installed.
        operators: the names of those that are used.
        rounds: how they round, for the libraries that can be used here.
        problem: why it cannot be used, None if it can.
        broken: what went wrong while it was looked at, None if nothing did.
    """

    name: str
    version: str | None
    operators: tuple[str, ...]
    rounds: str
    problem: str | None
    broken: str | None


@dataclass(frozen=True)
class Report:
    """All that `normkit info` prints."""

    python: str
    system: str
    packages: tuple[Package, ...]
    checks: tuple[Check, ...]
    vendors: tuple[Vendor, ...]

    @property
    def healthy(self) -> bool:
        """Whether everything that is installed works."""
        parts: list[Package | Check | Trial] = [*self.packages, *self.checks]
        parts += [trial for check in self.checks for trial in check.trials]
        return not any(part.problem for part in parts) and not any(vendor.broken for vendor in self.vendors)


def collect() -> Report:
    """Look at this machine; imports every framework that is installed.

    Example:
        >>> report = collect()
        >>> [package.name for package in report.packages][:2], report.checks[0].framework
        (['normkit', 'numpy'], 'numpy')
    """
    packages = tuple(_package(name) for name in PACKAGES)
    frameworks = [package.name for package in packages if package.version and package.name in _DEVICES]
    checks = tuple(check for framework in frameworks for check in _checks(framework))
    vendors = tuple(_vendor(name) for name in VENDORS)
    return Report(platform.python_version(), platform.platform(), packages, checks, vendors)


def render(report: Report) -> str:
    """Return the report as text."""
    lines = [f"{'python':<10} {report.python} on {report.system}"]
    for package in report.packages:
        state = package.version or ("not installed" if package.problem is None else f"BROKEN: {package.problem}")
        lines.append(f"{package.name:<10} {state}")
    lines += ["", "vendors' libraries:"]
    for vendor in report.vendors:
        usable = f"{', '.join(vendor.operators)}; rounds {vendor.rounds}"
        state = f"BROKEN: {vendor.broken}" if vendor.broken else vendor.problem or f"{vendor.version}: {usable}"
        lines.append(f"  {vendor.name:<10} {state}")
    lines += ["", f"add_rms_norm of {SHAPE} float32 with a weight, against the reference in float64:"]
    for check in report.checks:
        lines += ["", f"{check.framework} on {check.device}"]
        if check.problem is not None:
            lines.append(f"  BROKEN: {check.problem}")
        choice = next((trial for trial in check.trials if trial.verdict.accepted), None)
        for trial in check.trials:
            state = "runs" if trial is choice else "could run" if trial.verdict.accepted else "no"
            lines.append(f"  {trial.verdict.name:<10} {state:<10} {trial.verdict.reason}{_outcome(trial)}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `normkit info` to a parser: it has none."""


def run(arguments: argparse.Namespace) -> int:
    """Print the report.

    Returns:
        0, or 1 if something that is installed does not work.
    """
    report = collect()
    print(render(report))
    return 0 if report.healthy else 1


def _attempt(function: Callable[..., T], *arguments: Any) -> tuple[T | None, str | None]:
    """Return what the function returns, or what went wrong."""
    try:
        return function(*arguments), None
    # Any exception: how a broken installation fails cannot be foreseen, and the report is there to show it.
    except Exception as error:  # noqa: BLE001
        return None, " ".join(f"{type(error).__name__}: {error}".split())


def _package(name: str) -> Package:
    return Package(name, *_attempt(_version, name))


def _version(name: str) -> str | None:
    try:
        return str(import_module(name).__version__)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None
        raise


def _vendor(name: str) -> Vendor:
    module = import_module(f"normkit.vendors.{name}")
    found, broken = _attempt(module.found)
    if found is None or found.problem:
        return Vendor(name, found and found.version, module.OPERATORS, "", found and found.problem, broken)
    rounds, broken = _attempt(module.rounds)
    return Vendor(name, found.version, module.OPERATORS, rounds or "", None, broken)


def _torch_devices() -> dict[str, Any]:
    """Return the devices that torch sees by what to call them."""
    torch = import_module("torch")
    platform_of = import_module("normkit_torch.device").platform_of
    devices = {"cpu": torch.device("cpu")}
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        for index in range(torch.accelerator.device_count()):
            device = torch.device(kind, index)
            name = torch.get_device_module(kind).get_device_name(index)
            devices[f"{device}, {name} ({', '.join(filter(None, platform_of(device)))})"] = device
    return devices


def _jax_devices() -> dict[str, Any]:
    """Return the devices that JAX uses by default."""
    devices = import_module("jax").devices()
    return {f"{device}" if device.platform == "cpu" else f"{device}, {device.device_kind}": device for device in devices}


_DEVICES: dict[str, Callable[[], dict[str, Any]]] = {
    "numpy": lambda: {"cpu": None},
    "torch": _torch_devices,
    "jax": _jax_devices,
}


def _put(framework: str, array: np.ndarray[Any, Any], device: Any) -> Any:
    """Return a NumPy array as one of the framework on the device."""
    if framework == "torch":
        return import_module("torch").from_numpy(array).to(device)
    return import_module("jax").device_put(array, device) if framework == "jax" else array


def _checks(framework: str) -> list[Check]:
    devices, problem = _attempt(_DEVICES[framework])
    if devices is None:
        return [Check(framework, "no device", (), problem)]
    return [_check(framework, name, device) for name, device in devices.items()]


def _check(framework: str, name: str, device: Any) -> Check:
    trials, problem = _attempt(_trials, framework, device)
    return Check(framework, name, trials or (), problem)


def _trials(framework: str, device: Any) -> tuple[Trial, ...]:
    front_end = import_module("normkit" if framework == "numpy" else f"normkit_{framework}")
    arrays = [_put(framework, array, device) for array in _typical()]
    return tuple(_trial(front_end, arrays, verdict) for verdict in front_end.explain("add_rms_norm", *arrays))


def _trial(front_end: Any, arrays: list[Any], verdict: Verdict) -> Trial:
    return Trial(verdict, *(_attempt(_smoke, front_end, arrays, verdict.name) if verdict.accepted else (None, None)))


def _typical() -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal(shape, np.float32) for shape in (SHAPE, SHAPE, SHAPE[1:])]


def _smoke(front_end: Any, arrays: list[Any], implementation: str) -> float:
    x, residual, weight = _typical()
    operands = [Operand(array.shape, "float32") for array in (x, residual, weight)]
    expected = tolerance.expected_forward(describe(NormSpec("rms"), *operands), x, residual, weight)
    results = [_to_numpy(result) for result in front_end.add_rms_norm(*arrays, implementation=implementation)]
    error = max(tolerance.worst(*pair) for pair in zip(results, expected, strict=True))
    if not error <= 1:
        raise ArithmeticError(f"the result is {error:.3g} times the bound away from the reference")
    return error


def _to_numpy(array: Any) -> np.ndarray[Any, Any]:
    return np.asarray(array.cpu() if hasattr(array, "cpu") else array)


def _outcome(trial: Trial) -> str:
    if trial.problem is not None:
        return f"; WRONG: {trial.problem}"
    return "" if trial.error is None else f"; OK, error {trial.error:.2f} of the bound"
