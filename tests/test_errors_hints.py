# SPDX-License-Identifier: Apache-2.0
"""What errors say would work, where a caller has another library's interface in mind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import normkit
from normkit import DtypeError, MissingPackageError, OptionError
from normkit.spec import NormSpec, Operand, describe
from normkit.vendors import guards

from .frameworks import Framework, installed

FRAMEWORKS = installed()
ROOT = Path(__file__).parent.parent
EACH = pytest.mark.parametrize("framework", FRAMEWORKS.values(), ids=FRAMEWORKS)
SIZES = pytest.mark.parametrize("size", [8, (8,), [1.0] * 8])
ONES = np.ones((2, 8), np.float32)


@EACH
@SIZES
def test_a_size_is_not_a_weight(framework: Framework, size: Any) -> None:
    with pytest.raises(DtypeError, match=r"weight must be .*, got (int|tuple|list); give the weight itself.*normalized_shape$"):
        framework.front_end.rms_norm(framework.array(ONES), size)


@SIZES
def test_a_module_wants_a_weight_and_not_a_size(size: Any) -> None:
    torch_front_end = pytest.importorskip("normkit_torch", exc_type=ImportError)
    with pytest.raises(DtypeError, match=r"weight must be a torch.Tensor, got (int|tuple|list); give the weight itself"):
        torch_front_end.FastRMSNorm(size)


def test_a_pytree_may_have_any_leaf_until_it_is_called() -> None:
    jax, front_end = (pytest.importorskip(name, exc_type=ImportError) for name in ("jax", "normkit_jax"))
    norms = front_end.FastRMSNorm(np.ones((3, 8), np.float32))
    assert jax.tree.map(lambda weight: weight.size, norms).weight == 24
    y, _ = jax.vmap(lambda norm, x: norm(x), in_axes=(front_end.FastRMSNorm(0), None))(norms, ONES)
    assert y.shape == (3, 2, 8)
    with pytest.raises(DtypeError, match=r"weight must be a JAX or NumPy array .*, got int; give the weight itself"):
        front_end.FastRMSNorm(8)(ONES)


def test_arrays_of_another_framework_than_numpys() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(DtypeError, match=r"^weight must be a NumPy array like x, or speak DLPack, got torch.Tensor$"):
        normkit.rms_norm(ONES, torch.ones(8))
    with pytest.raises(DtypeError, match=r"^x must be an array of NumPy, PyTorch or JAX, or speak DLPack, got list$"):
        normkit.rms_norm([1.0], torch.ones(8))


@EACH
def test_explain_names_the_function_that_does_not_take_this(framework: Framework) -> None:
    with pytest.raises(TypeError, match=r"^rms_norm\(\) got an unexpected keyword argument 'epsilon'$"):
        framework.front_end.explain("rms_norm", framework.array(ONES), epsilon=1e-6)


def test_eps_of_jax_is_made_a_number() -> None:
    jax, front_end = (pytest.importorskip(name, exc_type=ImportError) for name in ("jax", "normkit_jax"))
    with pytest.raises(OptionError, match=r"^eps must be a Python number .*: give float\(eps\)$"):
        front_end.rms_norm(ONES, eps=jax.numpy.float32(1e-5))
    with pytest.raises(OptionError, match=r"^eps must be a Python number .*: bind it with functools.partial"):
        jax.jit(lambda eps: front_end.rms_norm(ONES, eps=eps))(1e-5)


@pytest.mark.parametrize("vendor", ["vLLM", "IPEX"])
def test_where_no_gradient_is_needed_the_reason_says_how_to_say_so(vendor: str) -> None:
    problem = describe(NormSpec("rms"), Operand((2, 8), "float32"), needs_grad=True)
    reason = guards.refusal(problem, vendor)
    assert reason
    for way in ("torch.inference_mode()", "torch.no_grad()", "requires_grad_(False)"):
        assert way in reason


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_front_end_without_its_framework(framework: str) -> None:
    code = (
        "import sys, normkit\n"
        f"sys.modules[{framework!r}] = None\n"
        f"try:\n    import normkit_{framework}\n"
        "except normkit.MissingPackageError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.startswith(f"normkit_{framework} needs the package {framework}: pip install {framework} ("), done.stderr


def test_a_target_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("normkit_jax.target", exc_type=ImportError)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"^target\('sm_90'\) compiles"):
        module.target("sm_90")


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_numpy_arrays_that_are_more_than_their_elements() -> None:
    for kind in (np.ma.masked_less(ONES, 0), np.asmatrix(ONES)):
        for call in (
            lambda x: normkit.rms_norm(x),
            lambda x: normkit.add_rms_norm(ONES, x),
            lambda x: normkit.rms_norm(ONES, out=x),
        ):
            with pytest.raises(DtypeError, match=r"^(x|residual|out) must be a plain NumPy array.*, got numpy\.(ma|matrix)"):
                call(kind)
    memory_mapped = ONES.view(np.memmap)
    np.testing.assert_array_equal(normkit.rms_norm(memory_mapped), normkit.rms_norm(ONES))
