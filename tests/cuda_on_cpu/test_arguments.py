"""Argument structs are packed as a C++ compiler lays them out."""

from __future__ import annotations

import importlib
import pkgutil
import struct

import pytest
import torch
from cupy.cuda import nvrtc
from emulator import ROOTS
from probes import PROBE

import kernels.cuda
from kernels.cuda.arguments import (
    AXIS,
    FLOAT,
    GEOMETRY,
    INT,
    POINTER,
    TENSOR,
    Struct,
    allows_tf32,
    pack_geometry,
    pack_tensor,
)
from kernels.problem import Axis, Problem

for module in pkgutil.iter_modules(kernels.cuda.__path__):  # each registers its own structs
    importlib.import_module(f"kernels.cuda.{module.name}")


@pytest.mark.parametrize("name", sorted(Struct.registered))
def test_layout_is_that_of_the_compiler(name):
    layout = Struct.registered[name]
    checks = [f"static_assert(sizeof(fastna::{name}) == {layout.size});"]
    checks += [f"static_assert(OFFSET(fastna::{name}, {field}) == {at});" for field, at in layout.offsets.items()]
    text = f'#include "{layout.header}"\n#define OFFSET(type, field) __INTADDR__(&((type*)0)->field)\n' + "\n".join(
        checks
    )
    program = nvrtc.createProgram(text, f"{name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, ("-arch=sm_90a", "-std=c++17", *(f"-I{root}" for root in ROOTS)))
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


def test_a_geometry_holds_the_problem_behind_axes_of_one():
    axes = (Axis(20, 7, 2, 3, True), Axis(9, 4))
    problem = Problem(2, axes, 6, 3, 32, 16, 0.25, torch.float16, torch.device("cpu"), additional=5)
    packed = pack_geometry(problem)
    assert len(packed) == GEOMETRY.size
    expected = (1, 1, 1, 1, 0, 20, 7, 2, 3, 1, 9, 4, 1, 1, 0, 2, 6, 3, 5, 0.25)
    assert struct.unpack("<19if", packed) == expected


def test_strides_of_a_slice_of_a_packed_projection():
    qkv = torch.empty(2, 9, 11, 3, 4, 8)
    key = qkv.unbind(3)[1]
    batch = 9 * 11 * 3 * 4 * 8
    assert struct.unpack("<Q5q", pack_tensor(key.stride(), 2)) == (0, batch, 0, 11 * 96, 96, 8)
    lse = torch.empty(2, 9, 11, 4)
    assert struct.unpack("<Q5q", pack_tensor(lse.stride(), 2)) == (0, 396, 0, 44, 4, 1)


def test_pointers_are_written_over_a_copy():
    two = Struct("TensorsForATest", query=TENSOR, count=INT, rpb=POINTER)
    del Struct.registered[two.name]
    packed = two.pack(query=pack_tensor((8, 4, 2), 1), count=3)
    filled = two.pointers("query.data", "rpb")(packed, 2**48 - 1, 0x1234)
    assert struct.unpack_from("<Q", filled, two.offsets["rpb"]) == (0x1234,)
    assert struct.unpack_from("<Q", filled, two.offsets["query.data"]) == (2**48 - 1,)
    assert packed == two.pack(query=pack_tensor((8, 4, 2), 1), count=3)
    assert struct.unpack_from("<i", filled, two.offsets["count"]) == (3,)
    assert two.pointers()(packed, 2**48 - 1, 0x1234) == filled, "all pointers, in the order of their declaration"
    with pytest.raises(ValueError, match="in another order"):
        two.pointers("rpb", "query.data")


def test_a_field_that_is_unknown_missing_or_of_another_size_is_named():
    with pytest.raises(KeyError, match=r"ProbeArguments has no field \['c'\]"):
        PROBE.pack(count=1, c=2)
    with pytest.raises(TypeError, match=r"ProbeArguments\.count needs a value"):
        PROBE.pack()
    with pytest.raises(OverflowError, match=r"ProbeArguments\.count: 2147483648 is no int"):
        PROBE.pack(count=2**31)
    with pytest.raises(TypeError, match=r"Geometry\.axis takes 60 bytes, not 40"):
        GEOMETRY.pack(axis=[b"\0" * AXIS.size] * 2, batch=1, heads=1, key_heads=1, additional=0, scale=1.0)


@pytest.mark.parametrize(
    "allow",
    [
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: torch.set_float32_matmul_precision("high"),
    ],
    ids=["fp32_precision", "allow_tf32", "set_float32_matmul_precision"],
)
def test_tf32_is_allowed_by_any_spelling(allow):
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert not allows_tf32()
        allow()
        assert allows_tf32()
    finally:
        torch.set_float32_matmul_precision("highest")


def test_padding_follows_natural_alignment():
    mixed = Struct("PaddedForATest", small=INT, pointer=POINTER, last=FLOAT)
    del Struct.registered[mixed.name]
    assert (mixed.offsets, mixed.size) == ({"small": 0, "pointer": 8, "last": 16}, 24)
