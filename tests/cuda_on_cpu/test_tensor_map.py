"""Tensor maps, with a function in place of the driver's that keeps what it is given."""

from __future__ import annotations

import ctypes

import pytest
import torch

from kernels.cuda import tensor_map
from kernels.errors import KernelError

LAYOUT = (torch.bfloat16, (64, 9, 8, 1, 2), (64, 576, 4608, 4608), (32, 4, 2, 1, 1), (1, 2, 3, 1, 1), 64)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What it was asked for. It refuses addresses that are no multiples of 16."""
    asked: list[dict[str, object]] = []
    long, short = ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint32)
    types = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, long, long, short, short

    @ctypes.CFUNCTYPE(ctypes.c_int, *types, *(ctypes.c_int,) * 4)
    def encode(to, dtype, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill):
        asked.append({"to": to, "address": address, "sizes": sizes[:5], "strides": strides[:4]})
        asked[-1] |= {"box": box[:5], "steps": steps[:5], "settings": (dtype, rank, interleave, swizzle)}
        ctypes.memset(to, len(asked), tensor_map.BYTES)
        return 1 if address % 16 else 0

    monkeypatch.setattr(tensor_map, "_encode", lambda: encode)
    return asked


def test_a_layout_makes_a_map_of_every_address(driver: list[dict[str, object]]) -> None:
    map_of = tensor_map.encoder(*LAYOUT)
    assert [map_of(16), map_of(1 << 40)] == [bytes([call]) * tensor_map.BYTES for call in (1, 2)]
    assert [asked["address"] for asked in driver] == [16, 1 << 40]
    for asked in driver:
        assert asked["to"] % tensor_map.BYTES == 0
        assert asked["sizes"] == [64, 9, 8, 1, 2]
        assert asked["strides"] == [128, 1152, 9216, 9216]  # bytes
        assert asked["box"] == [32, 7, 4, 1, 1]  # tokens between those taken included
        assert asked["steps"] == [1, 2, 3, 1, 1]
        assert asked["settings"] == (9, 5, 0, 2)


def test_a_refusal_names_what_was_asked_for(driver: list[dict[str, object]]) -> None:
    with pytest.raises(KernelError, match=r"address 0x18, torch\.bfloat16, sizes \[64, 9, 8, 1, 2\]"):
        tensor_map.encoder(*LAYOUT)(24)
