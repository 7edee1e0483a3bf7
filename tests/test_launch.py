# SPDX-License-Identifier: Apache-2.0
"""What reaches the driver: the launches and their arguments, and when Triton compiles anew. Nothing is computed here."""

from __future__ import annotations

import os

import pytest

from normkit.plan import ELEMENTS_HELD, MOST_TO_FEWEST

from .fake_driver import FakeDriver, FakeLaunch, compiled, fake_driver
from .machine_code import Accesses, accesses

pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton launches nothing while it interprets", allow_module_level=True)

import torch

import normkit_torch

HIDDEN = 256
ROWS = (1, 2, 15, 16, 17, 4096, 4097)


@pytest.fixture
def launches(driver: FakeDriver) -> list[FakeLaunch]:
    return driver.launches


def _rows(rows: int, dtype: torch.dtype = torch.bfloat16, hidden: int = HIDDEN) -> torch.Tensor:
    return torch.ones(rows, hidden, dtype=dtype)


def _parameter(hidden: int = HIDDEN) -> torch.Tensor:
    return torch.ones(hidden, dtype=torch.bfloat16)


def test_forward_is_one_launch_with_these_arguments(launches: list[FakeLaunch]) -> None:
    x, residual, weight, bias = _rows(50), _rows(50), _parameter(), _parameter()
    y, residual_out = normkit_torch.add_layer_norm(
        x, residual, weight, bias, eps=1e-3, weight_offset=1.0, implementation="triton"
    )
    (launch,) = launches
    assert launch.kernel == "forward_rows"
    rows_per_program = 2048 // HIDDEN
    assert launch.grid == (-(-50 // rows_per_program), 1, 1)
    given = launch.arguments
    tensors = {"x": x, "residual": residual, "weight": weight, "bias": bias, "y": y, "residual_out": residual_out}
    assert {name: given[f"{name}_ptr"] for name in tensors} == {n: t.data_ptr() for n, t in tensors.items()}
    assert given["mean_ptr"] is None and given["rstd_ptr"] is None
    assert (given["rows"], given["eps"], given["weight_offset"]) == (50, 1e-3, 1.0)
    constants: dict[str, object] = {"HIDDEN": HIDDEN, "BLOCK_M": rows_per_program, "BLOCK_N": HIDDEN, "SUBTRACT_MEAN": True}
    constants |= {"ROUNDING": "sum", "CONTIGUOUS": True, "IN_PLACE": False}
    assert {name: given[name] for name in constants} == constants
    assert launch.metadata.num_warps == 4
    assert launch.metadata.enable_fp_fusion is True


def test_rows_of_views_are_given_by_their_strides(launches: list[FakeLaunch]) -> None:
    packed = torch.ones(3, 5, 3 * 4 * 64, dtype=torch.bfloat16)
    heads = packed[..., 256:512].unflatten(-1, (4, 64))
    normkit_torch.rms_norm(heads, implementation="triton")
    (launch,) = launches
    assert launch.arguments["x_ptr"] == heads.data_ptr()
    names = ("rows", "inner_rows", "x_outer", "x_inner", "CONTIGUOUS")
    assert [launch.arguments[name] for name in names] == [60, 4, 768, 64, False]


def test_rows_far_apart_have_64_bit_strides(launches: list[FakeLaunch]) -> None:
    far = torch.empty_strided((2, 64), (2**31 + 64, 1), dtype=torch.bfloat16)
    normkit_torch.rms_norm(far, implementation="triton")
    (kernel,) = compiled()["forward_rows"]
    assert kernel.src.signature["x_outer"] == "i64"
    assert launches[0].arguments["x_outer"] == 2**31 + 64


@pytest.mark.parametrize(("rows", "reach"), [(2, 64 + 192), (3, 64 + 2 * 192)])
def test_rows_of_views_reach_from_the_first_to_the_last(rows: int, reach: int) -> None:
    """What a compiler for AMD is told about the size of an array, before it addresses that with 32 bits."""
    from normkit_torch import steps

    view = torch.empty(rows, 192, dtype=torch.bfloat16)[:, :64]
    assert steps._reach(view) == reach
    assert steps._reach(view[:1].expand(rows, 64)) == steps._reach(view[0]) == 64


@pytest.mark.parametrize(
    ("hidden", "kernels"),
    [
        (HIDDEN, ["backward_rows", "sum_partials", "sum_partials"]),
        (20000, ["backward_columns", "backward_long", "sum_partials", "sum_partials"]),
    ],
)
def test_backward_launches(launches: list[FakeLaunch], hidden: int, kernels: list[str]) -> None:
    x, residual = _rows(700, hidden=hidden).requires_grad_(), _rows(700, hidden=hidden).requires_grad_()
    weight, bias = _parameter(hidden).requires_grad_(), _parameter(hidden).requires_grad_()
    y, residual_out = normkit_torch.add_layer_norm(x, residual, weight, bias, implementation="triton")
    statistics = [launches[0].arguments[name] for name in ("mean_ptr", "rstd_ptr")]
    launches.clear()
    dy, dresidual_out = _rows(700, hidden=hidden), _rows(700, hidden=hidden)
    gradients = torch.autograd.grad((y, residual_out), (x, residual, weight, bias), (dy, dresidual_out))
    assert [launch.kernel for launch in launches] == kernels
    partials, first, totals = launches[0].arguments, launches[-3].arguments, launches[-2:]
    assert first["dy_ptr"] == dy.data_ptr()
    assert first["dresidual_out_ptr"] == dresidual_out.data_ptr()
    assert first["h_ptr"] == residual_out.data_ptr()
    assert [first[name] for name in ("mean_ptr", "rstd_ptr")] == statistics
    assert first["dx_ptr"] == gradients[0].data_ptr() == gradients[1].data_ptr()
    parts = -(-700 // partials["rows_per_program"])
    assert parts * partials["BLOCK_N"] <= MOST_TO_FEWEST * ELEMENTS_HELD and parts in launches[0].grid
    for launch, name, gradient in zip(totals, ("dweight", "dbias"), gradients[2:], strict=True):
        assert launch.arguments["partial_ptr"] == partials[f"{name}_ptr"]
        assert launch.arguments["total_ptr"] == gradient.data_ptr()
        assert launch.arguments["programs"] == parts
    assert all(launch.metadata.enable_fp_fusion for launch in launches)


@pytest.mark.parametrize("padding", [0, 16])
def test_another_number_of_rows_compiles_nothing(launches: list[FakeLaunch], padding: int) -> None:
    weight = _parameter().requires_grad_()
    # a single row is contiguous however it lies
    for rows in ROWS[1 if padding else 0 :]:
        x = _rows(rows, hidden=HIDDEN + padding)[:, :HIDDEN].requires_grad_()
        y = normkit_torch.rms_norm(x, weight, implementation="triton")
        dy = _rows(rows, hidden=HIDDEN + padding)[:, :HIDDEN]
        torch.autograd.grad(y, (x, weight), dy)
    counts = {name: len(kernels) for name, kernels in compiled().items() if kernels}
    assert counts == {"forward_rows": 1, "backward_rows": 1, "sum_partials": 1}
    assert len(launches) == 3 * len(ROWS[1 if padding else 0 :])


def test_a_misaligned_tensor_has_its_own_kernel(launches: list[FakeLaunch]) -> None:
    aligned, misaligned = _rows(8), torch.ones(8 * HIDDEN + 1, dtype=torch.bfloat16)[1:].view(8, HIDDEN)
    for x in (aligned, misaligned, aligned, misaligned):
        normkit_torch.rms_norm(x, implementation="triton")
    assert len(launches) == 4
    first, second = (accesses("sm_90", kernel.asm["ptx"]) for kernel in compiled()["forward_rows"])
    # a thread has 16 elements; y, which is new, is aligned
    assert first == (Accesses(32, 0), Accesses(32, 0))
    assert second == (Accesses(0, 16), Accesses(32, 0))


@pytest.mark.parametrize(("padding", "wide"), [(16, True), (1, False)])
def test_rows_are_vectorised_only_if_their_stride_is_known_to_be_aligned(
    launches: list[FakeLaunch], padding: int, wide: bool
) -> None:
    normkit_torch.rms_norm(_rows(8, hidden=HIDDEN + padding)[:, :HIDDEN], implementation="triton")
    (kernel,) = compiled()["forward_rows"]
    load, store = accesses("sm_90", kernel.asm["ptx"])
    assert load == (Accesses(32, 0) if wide else Accesses(0, 16))
    assert store == Accesses(32, 0)
    assert len(launches) == 1


def test_in_place_writes_to_what_it_was_given(launches: list[FakeLaunch]) -> None:
    x, residual = _rows(8), _rows(8)
    normkit_torch.add_rms_norm_(x, residual, implementation="triton")
    (launch,) = launches
    pointers = [launch.arguments[f"{name}_ptr"] for name in ("x", "y", "residual", "residual_out")]
    assert pointers == [x.data_ptr()] * 2 + [residual.data_ptr()] * 2
    assert launch.arguments["IN_PLACE"] is True


def test_tensors_to_write_to_are_given_to_the_kernel_if_they_are_contiguous(launches: list[FakeLaunch]) -> None:
    x, residual, out, residual_out = _rows(8), _rows(8), _rows(8), _rows(8)
    normkit_torch.add_rms_norm(x, residual, out=out, residual_out=residual_out, implementation="triton")
    normkit_torch.add_rms_norm(x, residual, out=_rows(8, hidden=2 * HIDDEN)[:, :HIDDEN], implementation="triton")
    direct, apart = (launch.arguments for launch in launches)
    names = ("y", "residual_out")
    assert [direct[f"{name}_ptr"] for name in names] == [out.data_ptr(), residual_out.data_ptr()]
    assert apart["y_ptr"] not in (out.data_ptr(), residual_out.data_ptr()) and apart["y_ptr"] % 16 == 0
    assert direct["IN_PLACE"] is apart["IN_PLACE"] is False


@pytest.mark.parametrize("hidden", [HIDDEN, 20000])
def test_no_rows_launch_nothing_but_the_totals(launches: list[FakeLaunch], hidden: int) -> None:
    x, weight = _rows(0, hidden=hidden).requires_grad_(), _parameter(hidden).requires_grad_()
    y = normkit_torch.rms_norm(x, weight, implementation="triton")
    assert launches == []
    torch.autograd.grad(y, (x, weight), _rows(0, hidden=hidden))
    assert [(launch.kernel, launch.arguments["programs"]) for launch in launches] == [("sum_partials", 0)]


def test_nothing_is_left_behind() -> None:
    from triton.runtime.driver import driver

    from normkit_torch import device

    before = driver._active, device.platform_of
    with fake_driver():
        normkit_torch.rms_norm(_rows(8), implementation="triton")
    assert (driver._active, device.platform_of) == before
    assert not compiled()
