# SPDX-License-Identifier: Apache-2.0
"""What the vendors' operators do wrong without a word, or end the process with: refused, with a reason, before they run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import normkit_torch
from normkit import DtypeError, ShapeError, UnsupportedError

from .vendor import MODULE, NAME, recorded, rows

ROOT = Path(__file__).parents[2]


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(rows(*shape, seed=seed)).to(dtype)


def refused(function: str, *operands: Any, match: str, **options: Any) -> None:
    """Check that a call is refused with a reason, by name and in `explain`, and that another implementation computes it."""
    call: Callable[..., Any] = getattr(normkit_torch, function)
    with recorded() as calls, pytest.raises(UnsupportedError, match=match):
        call(*operands, implementation=NAME, **options)
    # nothing of this call, though rows of its own may be computed to see how they are rounded
    assert not any(given.x.data_ptr() == operands[0].data_ptr() for given, _ in calls)
    verdict = next(v for v in normkit_torch.explain(function, *operands, **options) if v.name == NAME)
    assert not verdict.accepted
    with torch.no_grad():
        detached: list[Any] = [operand if operand is None else operand.detach() for operand in operands]
        verdicts = normkit_torch.explain(function, detached[0], *detached[1:], **options)
        taken = next(verdict.name for verdict in verdicts if verdict.accepted)
        results, expected = call(*detached, **options), call(*detached, implementation=taken, **options)
    assert taken in ("cpu", "reference")
    pairs = zip(results, expected, strict=True) if isinstance(results, tuple) else [(results, expected)]
    for result, other in pairs:
        torch.testing.assert_close(result, other, rtol=0, atol=0)


def test_strided_rows() -> None:
    """The operators would write into what lies between the rows."""
    buffers = [tensor(8, 96, seed=seed) for seed in (0, 1)]
    before = [buffer.clone() for buffer in buffers]
    views = [buffer[:, :64] for buffer in buffers]
    refused("add_rms_norm", *views, tensor(64), match="not contiguous")
    refused("add_rms_norm", views[0], tensor(8, 64), tensor(64), match="not contiguous")
    refused("add_rms_norm", tensor(8, 64), views[1], tensor(64), match="not contiguous")
    refused("rms_norm", tensor(64, 8).T, tensor(64), match="not contiguous")
    with pytest.raises(UnsupportedError, match="not contiguous"):
        normkit_torch.add_rms_norm_(views[0], views[1], tensor(64), implementation=NAME)
    assert all(torch.equal(buffer, copy) for buffer, copy in zip(buffers, before, strict=True))


def test_a_strided_weight_is_made_contiguous() -> None:
    weight = tensor(128)[::2]
    found = normkit_torch.rms_norm(tensor(4, 64), weight, implementation=NAME)
    torch.testing.assert_close(found, normkit_torch.rms_norm(tensor(4, 64), weight), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 64), (3, 64), (4, 32), (4, 128)])
def test_a_residual_of_another_shape(shape: tuple[int, ...]) -> None:
    with recorded() as calls, pytest.raises(ShapeError, match=r"residual must have shape \(4, 64\)"):
        normkit_torch.add_rms_norm(tensor(4, 64), tensor(*shape), tensor(64), implementation=NAME)
    assert not calls


@pytest.mark.parametrize("length", [1, 63, 65])
def test_a_weight_of_another_length(length: int) -> None:
    with recorded() as calls, pytest.raises(ShapeError, match=r"weight must have shape \(64,\)"):
        normkit_torch.rms_norm(tensor(4, 64), tensor(length), implementation=NAME)
    assert not calls


def test_mixed_dtypes() -> None:
    x, half = tensor(4, 64), tensor(4, 64, dtype=torch.float16)
    refused("add_rms_norm", half, x, tensor(64), match="in one dtype, and here are float16 and float32")
    refused("add_rms_norm", x, x, tensor(64), out_dtype=torch.float16, match="in one dtype")
    refused("rms_norm", x.double(), tensor(64).double(), match="not enough for float64")
    with pytest.raises(DtypeError, match="int32"):
        normkit_torch.rms_norm(x.int(), implementation=NAME)
    if NAME == "vllm":
        refused("rms_norm", half, tensor(64), match="wants the weight in x's dtype float16, and it is float32")


def test_gradients() -> None:
    """The operators' outputs would have none, or give wrong ones."""
    x, residual, weight = tensor(4, 64), tensor(4, 64, seed=1), tensor(64)
    for operands in ((x.requires_grad_(), residual, weight), (x.detach(), residual, weight.requires_grad_())):
        with pytest.raises(UnsupportedError, match="no backward pass, and a gradient is asked for"):
            normkit_torch.add_rms_norm(*operands, implementation=NAME)
    y, _ = normkit_torch.add_rms_norm(x, residual, weight)
    assert y.requires_grad
    with torch.no_grad():
        normkit_torch.add_rms_norm(x, residual, weight, implementation=NAME)


def test_a_rounding_policy_that_is_not_followed() -> None:
    x = tensor(4, 64, dtype=torch.float16)
    refused("add_rms_norm", x, x, x[0].clone(), rounding="hf", match="float16")
    # in float32 nothing is rounded on the way, and every policy is the same
    for policy in ("sum", "stored", "hf"):
        normkit_torch.add_rms_norm(tensor(4, 64), tensor(4, 64), tensor(64), rounding=policy, implementation=NAME)


def test_what_the_operators_do_not_compute() -> None:
    x, weight = tensor(4, 64), tensor(64)
    refused("rms_norm", x, weight, weight, match="takes? no bias")
    refused("rms_norm", x, weight, weight_offset=1.0, match="no weight_offset")
    refused("layer_norm", x, weight, match="no LayerNorm")
    if NAME == "vllm":
        refused("add_layer_norm", x, x, weight, match="no LayerNorm")
        refused("rms_norm", tensor(4, 60), tensor(60), match="multiple of 8, and it is 60")
    torch.testing.assert_close(normkit_torch.rms_norm(x, implementation=NAME), normkit_torch.rms_norm(x), rtol=1e-6, atol=1e-6)


def test_layer_norm_in_float32_with_a_large_mean() -> None:
    if NAME != "ipex":
        pytest.skip("only IPEX has an add and LayerNorm")
    refused(
        "add_layer_norm", tensor(4, 64) + 1e4, tensor(4, 64), tensor(64), match="in one pass.*wrong where the mean is large"
    )
    half = tensor(4, 64, dtype=torch.bfloat16)
    refused("add_layer_norm", half, half, rounding="sum", match="within the bound of rounding=None alone")
    refused("add_layer_norm", half, half, tensor(64, dtype=torch.float16), match="weight in float32 or in x's dtype bfloat16")
    refused("add_layer_norm", half, half, None, tensor(64), match="bias in the weight's dtype")


def program(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)


def test_no_columns_do_not_end_the_process() -> None:
    done = program(
        "import torch, normkit_torch\n"
        "try:\n"
        f"    normkit_torch.rms_norm(torch.ones(4, 0), torch.ones(0), implementation={NAME!r})\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    assert (done.returncode, done.stdout[:28]) == (0, "x must have a last dimension"), done.stderr


def test_a_package_for_another_torch_is_not_imported() -> None:
    """IPEX ends the process then, in some releases, and vLLM's libraries do not load."""
    code = (
        "import sys\n"
        "from importlib import metadata\n"
        "version = metadata.version\n"
        "metadata.version = lambda name: '2.13.0' if name == 'torch' else version(name)\n"
        f"from normkit.vendors import {NAME}\n"
        f"print({NAME}.found().problem)\n"
        "print('intel_extension_for_pytorch' in sys.modules)\n"
    )
    done = program(code)
    assert done.returncode == 0, done.stderr
    if NAME == "ipex":
        assert done.stdout == "IPEX 2.8.0 belongs to torch 2.8, and this is torch 2.13.0\nFalse\n"
    else:
        assert done.stdout == "None\nFalse\n"


def test_a_package_that_breaks_while_it_is_imported_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("libsomething.so.8: cannot open shared object file")

    if NAME == "ipex":
        monkeypatch.setattr(MODULE, "_functional", broken)
        assert "OSError: libsomething.so.8" in MODULE.found.__wrapped__().problem
    else:
        monkeypatch.setattr(MODULE, "_registered", lambda: False)
        monkeypatch.setattr(MODULE, "_libraries", lambda _: [])
        monkeypatch.setattr(MODULE, "import_module", broken)
        assert MODULE._load() == "OSError: libsomething.so.8: cannot open shared object file"


def test_an_environment_is_not_made_over_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for script, arguments in (
        ("vendors", [NAME, str(tmp_path), sys.executable]),
        ("jax_gpu", [sys.executable, "1", "1", str(tmp_path)]),
    ):
        command = ["bash", str(ROOT / f"tests/{script}/make_env.sh"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, "name another directory" in done.stderr) == (2, True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_of_several_libraries_the_one_for_this_processor_is_loaded_and_once() -> None:
    if NAME != "vllm":
        pytest.skip("IPEX is one library")
    [library] = MODULE._libraries(torch)
    name = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512" if torch.cpu._is_avx512_supported() else "_C_AVX2"
    assert library.name.split(".")[0] == name
    code = "from normkit.vendors import vllm\nassert not vllm._load() and not vllm._load()\nprint('alive')"
    assert program(code).stdout == "alive\n"


def test_a_library_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    if NAME != "vllm":
        pytest.skip("IPEX is imported as Python")
    monkeypatch.setattr(MODULE, "_registered", lambda: False)
    monkeypatch.setattr(torch.ops, "load_library", _refuse)
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", None)
    assert "undefined symbol" in MODULE._load()


def _refuse(path: str) -> None:
    raise OSError("undefined symbol")
