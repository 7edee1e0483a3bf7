# SPDX-License-Identifier: Apache-2.0
"""Where Triton cannot compile a kernel, JAX's program has the next implementation, and it is said why; one named is an error.

On the CPU, whose lowering is given the kernels for the time of a test, so that what is chosen then also runs.
"""

from __future__ import annotations

import errno
import os
import subprocess
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")
pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing while it interprets", allow_module_level=True)

import jax
from triton.compiler.errors import CompilationError
from triton.runtime.errors import PTXASError

import normkit_jax
from normkit import LaunchError, UnsupportedError, compile
from normkit.registry import Verdict
from normkit_jax import device, launch

from .at_once import at_once
from .jax_failure import kernels_on_the_cpu
from .jax_gpu.decoder import messages

HIDDEN = 72
ERRORS = {
    "no assembler": RuntimeError("PTXAS error: no C compiler"),
    "the assembler refuses": PTXASError("`ptxas` failed with error code 255"),
    "the compiler refuses": CompilationError(None, None, "an operation that it does not have"),
    "a process fails": subprocess.CalledProcessError(1, ["ptxas"]),
    "a cache that cannot be written": PermissionError("[Errno 13] Permission denied: '/cache'"),
    "triton cannot be imported": ImportError("libtriton.so: undefined symbol"),
}
Results = tuple[Any, ...]


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def forward(**options: Any) -> Results:
    return normkit_jax.add_rms_norm(normal(5, HIDDEN), normal(5, HIDDEN, seed=1), normal(HIDDEN), **options)


def jitted(**options: Any) -> Results:
    function = jax.jit(lambda *given: normkit_jax.add_rms_norm(*given, **options))
    return tuple(function(normal(5, HIDDEN), normal(5, HIDDEN, seed=1), normal(HIDDEN)))


def in_place(**options: Any) -> Results:
    return normkit_jax.add_rms_norm_(normal(5, HIDDEN), normal(5, HIDDEN, seed=1), normal(HIDDEN), **options)


def mapped(**options: Any) -> Results:
    return (jax.vmap(lambda x: normkit_jax.rms_norm(x, normal(HIDDEN), **options))(normal(3, 5, HIDDEN)),)


def gradient(**options: Any) -> Results:
    given = normal(5, HIDDEN), normal(5, HIDDEN, seed=1), normal(HIDDEN), normal(HIDDEN, seed=2)
    results, vjp = jax.vjp(lambda *given: normkit_jax.add_layer_norm(*given, **options), *given)
    return *results, *vjp((normal(5, HIDDEN, seed=3), normal(5, HIDDEN, seed=4)))


def second_derivative(**options: Any) -> Results:
    def loss(x: Any) -> Any:
        return (normkit_jax.rms_norm(x, **options) ** 3).sum()

    return (jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum())(normal(2, HIDDEN)),)


def without_jit(**options: Any) -> Results:
    with jax.disable_jit():
        return forward(**options)


CALLS = (forward, jitted, in_place, mapped, gradient, second_derivative, without_jit)
EACH_CALL = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Let kernels whose names start so not compile for an error; what is tried is listed."""

    def failing(error: Exception | None, kernels: str = "") -> list[str]:
        tried: list[str] = []

        def compile_step(step: Any, *given: Any) -> Any:
            tried.append(step.kernel)
            if error is not None and step.kernel.startswith(kernels):
                raise error
            return compile.compile_step(step, *given)

        monkeypatch.setattr(launch, "compile_step", compile_step)
        return tried

    monkeypatch.setattr(launch._failures, "_reasons", {})
    jax.clear_caches()
    yield failing
    jax.clear_caches()


def same(found: Results, expected: Results) -> bool:
    return len(found) == len(expected) and all(map(np.array_equal, found, expected))


def causes(error: BaseException) -> list[BaseException]:
    """Return the causes of an error; JAX puts one of its own among them."""
    return [] if error.__cause__ is None else [error.__cause__, *causes(error.__cause__)]


def verdict(monkeypatch: pytest.MonkeyPatch, arch: str = "sm_90", hidden: int = HIDDEN) -> Verdict:
    with monkeypatch.context() as patched:
        patched.setattr(device, "platform_of", lambda _: "cuda")
        patched.setattr(device, "arch_of", lambda *_: arch)
        x = normal(5, hidden)
        return {one.name: one for one in normkit_jax.explain("add_rms_norm", x, x, normal(hidden))}["triton"]


def lowered(function: Callable[..., Any], arch: str = "sm_90", hidden: int = HIDDEN) -> str:
    """Lower for cuda; the function is another one each time, so that JAX has not lowered it before."""
    given = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((5, hidden), (5, hidden), (hidden,))]
    with normkit_jax.target(arch):
        return str(jax.jit(lambda *given: function(*given)).trace(*given).lower(lowering_platforms=("cuda",)).as_text())


def kernels_of(text: str) -> list[str]:
    return [message.name.removeprefix("normkit_") for message, _ in messages(text)]


def results_and_gradients(*given: Any) -> Any:
    results, vjp = jax.vjp(normkit_jax.add_rms_norm, *given)
    return results, vjp(results)


@pytest.mark.parametrize(
    ("call", "name"),
    [*((call, "no assembler") for call in CALLS), *((jitted, name) for name in list(ERRORS)[1:])],
    ids=lambda of: of if isinstance(of, str) else of.__name__,
)
def test_the_next_implementation_computes_and_says_why_once(call: Callable[..., Results], name: str, fail: Any) -> None:
    expected = call(implementation="reference")
    error = ERRORS[name]
    tried = fail(error)
    with kernels_on_the_cpu():
        with pytest.warns(RuntimeWarning) as said:
            found = call()
        (message,) = [str(one.message) for one in said if issubclass(one.category, RuntimeWarning)]
        assert "Triton could not compile" in message and " ".join(str(error).split())[:40] in message
        assert "calls like this one are computed by reference from now on, not by triton" in message
        assert len(tried) == 1
        fail(None)  # it would work now, and is not tried again
        jax.clear_caches()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            assert same(found, expected) and same(call(), expected)


@EACH_CALL
def test_the_one_asked_for_by_name_raises(call: Callable[..., Results], fail: Any) -> None:
    error = ERRORS["no assembler"]
    fail(error)
    says = r"implementation='triton' cannot compute this: Triton could not compile \w+ for sm_90: RuntimeError: PTXAS error"
    with kernels_on_the_cpu(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for turn in range(2):
            with pytest.raises(UnsupportedError, match=says + ".* implementation=None would take reference") as raised:
                call(implementation="triton")
            if not turn:
                assert [one for one in causes(raised.value) if one is error or isinstance(one, LaunchError)][1:] == [error]


@pytest.mark.parametrize("function", [normkit_jax.add_rms_norm, results_and_gradients], ids=lambda one: one.__name__)
def test_explain_has_the_reason_from_then_on(function: Any, fail: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict(monkeypatch).accepted
    fail(RuntimeError("no C compiler"))
    with pytest.warns(RuntimeWarning, match=r"no C compiler; calls like this one") as said:
        assert kernels_of(lowered(function)) == []
    assert len(said) == 1
    fail(None)
    rejected = verdict(monkeypatch)
    assert not rejected.accepted and rejected.reason.startswith("Triton could not compile forward_rows for sm_90: RuntimeError")
    assert kernels_of(lowered(function)) == []
    # other kernels are not set aside
    for other in ({"arch": "sm_100"}, {"hidden": 2 * HIDDEN}):
        assert verdict(monkeypatch, **other).accepted
        assert kernels_of(lowered(function, **other))[0] == "forward_rows"


def test_a_backward_pass_alone_that_cannot_be_compiled(fail: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(RuntimeError("too many registers"), "backward")
    with pytest.warns(RuntimeWarning, match="could not compile backward_rows .* too many registers; calls like") as said:
        assert kernels_of(lowered(results_and_gradients)) == ["forward_rows"]
    assert len(said) == 1 and "backward_rows" in verdict(monkeypatch).reason
    assert kernels_of(lowered(results_and_gradients)) == []


def test_the_last_kernel_of_a_backward_pass(fail: Any) -> None:
    fail(RuntimeError("no"), "sum_partials")
    with pytest.warns(RuntimeWarning, match="could not compile sum_partials"):
        # what was launched before it is in the program, and XLA drops what nothing uses
        assert kernels_of(lowered(results_and_gradients)) == ["forward_rows", "backward_rows"]
    assert kernels_of(lowered(results_and_gradients)) == []


@pytest.mark.parametrize("error", [TypeError("an argument"), KeyError("ptx_version"), ValueError("a constant"), IndexError()])
def test_errors_of_our_own_are_raised_as_they_are(error: Exception, fail: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(error)
    with pytest.raises(type(error)):
        lowered(normkit_jax.add_rms_norm)
    assert verdict(monkeypatch).accepted


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, "Cannot allocate memory"), RuntimeError("ptxas: out of memory")])
def test_want_of_memory_is_raised_and_not_remembered(error: Exception, fail: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(error)
    with pytest.raises(type(error), match="memory"):
        lowered(normkit_jax.add_rms_norm)
    fail(None)
    assert verdict(monkeypatch).accepted and kernels_of(lowered(normkit_jax.add_rms_norm)) == ["forward_rows"]


def test_in_threads_at_once(fail: Any) -> None:
    expected = gradient(implementation="reference")
    fail(RuntimeError("no"))
    right: list[bool] = []
    with kernels_on_the_cpu(), pytest.warns(RuntimeWarning, match="from now on") as said:
        at_once(lambda _: right.append(same(gradient(), expected)))
    assert right == [True] * 8
    # one whose call was under way when the first one failed says the same
    assert len({str(one.message) for one in said}) == 1
    with kernels_on_the_cpu(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        at_once(lambda _: right.append(same(gradient(), expected)))
    assert right == [True] * 16
