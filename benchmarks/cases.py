"""The problems that are measured: one frozen `Case` each, and the suites they come in.

Sizes are those of the paper (arXiv 2403.04690, section 5) and of the models that use neighborhood attention. The
paper's own lists of problems were never published; the `paper-*` suites are seeded samples over the same parameters.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels.problem import Axis, Problem

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One problem to time: sizes as in `kernels.problem.Problem`, dtype by name, `rpb` whether a bias is added."""

    name: str
    batch: int
    space: tuple[int, ...]
    heads: int
    head_dim: int
    window: tuple[int, ...]
    dilation: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    causal: tuple[bool, ...] = ()
    dtype: str = "bfloat16"
    rpb: bool = False

    def __post_init__(self) -> None:
        rank = len(self.space)
        for field, default in (("dilation", 1), ("stride", 1), ("causal", False)):
            if not getattr(self, field):
                object.__setattr__(self, field, (default,) * rank)

    @property
    def key(self) -> str:
        """What identifies the case in a results file, whatever its name."""
        axes = ["x".join(map(str, values)) for values in (self.space, self.window, self.dilation, self.stride)]
        causal = "".join("c" if axis else "-" for axis in self.causal)
        sizes = f"b{self.batch}h{self.heads}d{self.head_dim}"
        return "/".join((sizes, *axes, causal, self.dtype, "rpb" if self.rpb else "-"))

    def problem(self, device: torch.device) -> Problem:
        axes = zip(self.space, self.window, self.dilation, self.stride, self.causal, strict=True)
        return Problem(
            batch=self.batch, axes=tuple(Axis(*axis) for axis in axes), heads=self.heads, key_heads=self.heads,
            head_dim=self.head_dim, value_dim=self.head_dim, scale=self.head_dim**-0.5, dtype=DTYPES[self.dtype],
            device=device, rpb_dtype=torch.float32 if self.rpb else None,
        )  # fmt: skip

    def replace(self, **changes: object) -> Case:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def _sample(rank: int, count: int, seed: int = 2403_04690) -> list[Case]:
    """A seeded sample over batch, space, heads, head_dim, window and dilation, of 2^18 to 2^26 query elements each."""
    generator = random.Random(seed * 10 + rank)
    lengths = {
        1: (64, 128, 197, 256, 512, 1000, 1024, 2048, 4096, 8192, 16384, 32768),
        2: (7, 8, 14, 16, 24, 28, 32, 48, 56, 64, 96, 100, 128),
        3: (4, 8, 12, 16, 24, 30, 32, 48),
    }[rank]
    cases: list[Case] = []
    seen: set[str] = set()
    while len(cases) < count:
        space = tuple(generator.choice(lengths) for _ in range(rank))
        if rank > 1 and generator.random() < 0.5:
            space = (space[0],) * rank
        windows = []
        for length in space:
            odd = [
                k
                for k in (3, 5, 7, 9, 11, 13, 15, 17, 21, 25, 31, 33, 47, 63, 65, 127, 129, 255, 511, 1023, 2047)
                if k <= length
            ]
            windows.append(generator.choice(odd))
        if rank > 1 and generator.random() < 0.7:
            windows = [min(windows)] * rank
        dilations = tuple(
            generator.choice([1, 1, min(2, length // k), length // k // 2 or 1, length // k])
            for length, k in zip(space, windows, strict=True)
        )
        case = Case(
            name=f"{rank}d-{len(cases):04d}", batch=generator.choice((1, 2, 4, 8, 16, 32, 64, 128)), space=space,
            heads=generator.choice((1, 2, 3, 4, 6, 8, 12, 16, 24)), head_dim=generator.choice((32, 64, 128)),
            window=tuple(windows), dilation=dilations, dtype="float16",
        )  # fmt: skip
        elements = case.batch * case.heads * case.head_dim
        weights = case.batch * case.heads
        for length, window in zip(space, windows, strict=True):
            elements *= length
            weights *= length * window
        if 2**18 <= elements <= 2**26 and weights <= 2**31 and case.key not in seen:
            seen.add(case.key)
            cases.append(case)
    return cases


def _paper(rank: int) -> Callable[[bool], list[Case]]:
    def suite(quick: bool) -> list[Case]:
        cases = _sample(rank, 1000)
        return cases[:40] if quick else cases

    return suite


def _experiment_1(quick: bool) -> list[Case]:
    """Naive against GEMM and fused on 1-D sequences of growing length."""
    top = 14 if quick else 17
    return [
        Case(f"length {2**p}, window {w}", 4, (2**p,), 8, 64, (w,), dtype="float16")
        for p in range(8, top + 1)
        for w in (7, 63, 255)
        if w <= 2**p
    ]


def _experiment_2(quick: bool) -> list[Case]:
    """Full against half precision on 2-D patterns."""
    sides = (14, 28, 56) if quick else (14, 28, 56, 64, 96, 128)
    return [
        Case(
            f"{side}^2, window {w}, dilation {d}, {dtype}",
            16,
            (side, side),
            4,
            32,
            (w, w),
            dilation=(d, d),
            dtype=dtype,
        )
        for side in sides
        for w in (3, 7, 13)
        for d in sorted({1, side // w})
        if w <= side
        for dtype in ("float32", "float16", "bfloat16")
    ]


def _experiment_3(quick: bool) -> list[Case]:
    """The fused kernel under different configurations per spatial axis."""
    video, wide = (16, 32, 32), (64, 96)
    kinds = [
        Case("window 3x13", 8, wide, 4, 64, (3, 13)),
        Case("window 13x3", 8, wide, 4, 64, (13, 3)),
        Case("dilation 4x1", 8, wide, 4, 64, (7, 7), dilation=(4, 1)),
        Case("dilation 1x4", 8, wide, 4, 64, (7, 7), dilation=(1, 4)),
        Case("causal rows", 8, wide, 4, 64, (7, 7), causal=(True, False)),
        Case("causal columns", 8, wide, 4, 64, (7, 7), causal=(False, True)),
        Case("stride 4x1", 8, wide, 4, 64, (8, 8), stride=(4, 1)),
        Case("video 3x7x7", 2, video, 8, 64, (3, 7, 7)),
        Case("video causal time 5x7x7", 2, video, 8, 64, (5, 7, 7), causal=(True, False, False)),
        Case("video dilated time 4x7x7", 2, video, 8, 64, (4, 7, 7), dilation=(4, 1, 1)),
        Case("video stride 2x4x4", 2, video, 8, 64, (4, 8, 8), stride=(2, 4, 4)),
        Case(
            "video causal, dilated, strided",
            2,
            video,
            8,
            64,
            (4, 8, 6),
            dilation=(2, 1, 4),
            stride=(1, 4, 1),
            causal=(True, False, False),
        ),
    ]
    dtypes = ("float16",) if quick else ("float32", "float16", "bfloat16")
    return [case.replace(name=f"{case.name}, {dtype}", dtype=dtype) for case in kinds for dtype in dtypes]


def _ablation_window(quick: bool) -> list[Case]:
    """Growing windows up to full attention, where the gain over dense attention must vanish gracefully."""
    windows = (3, 7, 13, 21, 33, 47, 64)
    cases = [Case(f"64^2, window {w}", 4, (64, 64), 8, 64, (w, w), dtype="float16") for w in windows]
    if not quick:
        cases += [
            Case(f"4096, window {w}", 8, (4096,), 8, 64, (w,), dtype="float16") for w in (7, 63, 255, 1023, 2047, 4096)
        ]
    return cases


NAT_WIDTHS = {"tiny": 2, "small": 3, "base": 4, "large": 6}


def _nat(quick: bool) -> list[Case]:
    """Every attention layer of every published NAT, DiNAT, DiNAT_s, isotropic and ViT-RPB model, batch 128."""
    # heads of the first level, its side in tokens, window: the pyramids. Dilation 1, and one that spans the map.
    pyramids = [(name, heads, 56, 7) for name, heads in NAT_WIDTHS.items()]
    pyramids += [("large 384", 6, 96, 7), ("large 384, 11 x 11", 6, 96, 11), ("large 224, 11 x 11", 6, 56, 11)]
    cases = []
    for name, heads, side, published in pyramids:
        for level in range(4):
            length, window = side >> level, min(published, side >> level)
            for dilation in sorted({1, length // window}):
                layer = f"{name}, level {level}: {length}^2 h{heads << level} d{dilation}"
                shape = (length, length), heads << level, 32, (window, window), (dilation, dilation)
                cases.append(Case(layer, 128, *shape, rpb=True))
    for heads in (12, 24):
        for window, dilation in ((7, 1), (7, 2), (14, 1)):
            kind = "vitrpb" if window == 14 else "isotropic"
            layer = f"{kind} 14^2 h{heads} d{dilation}"
            cases.append(Case(layer, 128, (14, 14), heads, 32, (window, window), (dilation, dilation), rpb=True))
    distinct = list({case.key: case for case in reversed(cases)}.values())[::-1]
    return [case for case in distinct if case.name.startswith("tiny")] if quick else distinct


def _floors(quick: bool) -> list[Case]:
    """The two tables of floors that the fused kernels are held against: small windows first, then large ones."""
    small = [
        Case(f"{n}^2 h{h} d{d}", 128, (n, n), h, 32, (7, 7), dilation=(d, d), rpb=True)
        for n, h, d in ((56, 2, 1), (56, 2, 8), (28, 4, 1), (28, 4, 4), (14, 8, 1), (14, 8, 2), (7, 16, 1))
    ] + [Case("14^2 h12, head_dim 64", 128, (14, 14), 12, 64, (7, 7), rpb=True)]
    large = [
        Case("1-D 32k w2048 d128 h1", 1, (32768,), 1, 128, (2048,)),
        Case("2-D 128^2 k13 d64 h24", 1, (128, 128), 24, 64, (13, 13)),
        Case("2-D 256^2 k33 d128 h24", 1, (256, 256), 24, 128, (33, 33)),
        Case("2-D 256^2 k80 d128 h24", 1, (256, 256), 24, 128, (80, 80)),
        Case("3-D 30x48x80 w18x24x24 d128 h24", 1, (30, 48, 80), 24, 128, (18, 24, 24)),
    ]
    return small if quick else small + large


def _workloads(quick: bool) -> list[Case]:
    """Real workloads beyond classification."""
    style: dict[str, Any] = {"dtype": "float32", "rpb": True}
    small = [
        Case("HDiT 64^2", 32, (64, 64), 8, 64, (7, 7)),
        Case("StyleNAT 4^2, k3", 8, (4, 4), 16, 32, (3, 3), **style),
        Case("StyleNAT 16^2, dilation 2", 8, (16, 16), 16, 32, (7, 7), (2, 2), **style),
        Case("StyleNAT 64^2, dilation 8", 8, (64, 64), 8, 32, (7, 7), (8, 8), **style),
        Case("StyleNAT 256^2, dilation 1", 4, (256, 256), 4, 32, (7, 7), **style),
        Case("StyleNAT 256^2, dilation 32", 4, (256, 256), 4, 32, (7, 7), (32, 32), **style),
        Case("StyleNAT 1024^2, dilation 128", 1, (1024, 1024), 1, 32, (7, 7), (128, 128), **style),
        Case("OneFormer 160x272 k11", 1, (160, 272), 6, 32, (11, 11), rpb=True),
        Case("OneFormer 160x272 k11, dilation 14x24", 1, (160, 272), 6, 32, (11, 11), (14, 24), rpb=True),
        Case("All-in-One 1-D k5 d12, dilation 1", 8, (8192,), 2, 12, (5,), **style),
        Case("All-in-One 1-D k5 d12, dilation 1024", 8, (8192,), 2, 12, (5,), (1024,), **style),
        # In 16 bits a kernel wants multiples of 8 channels: 12 padded to 16.
        Case("All-in-One 1-D k5, dilation 64", 8, (4096,), 2, 16, (5,), (64,), rpb=True),
        Case("music 1-D k5 d24, dilation 256", 8, (8192,), 4, 24, (5,), (256,), rpb=True),
        Case("WeatherMesh 3-D 5x7x7", 1, (14, 90, 180), 8, 32, (5, 7, 7)),
        Case("StormScope 128x160 k31", 1, (128, 160), 16, 48, (31, 31)),
        Case("StormScope 128x160 k31 d96", 1, (128, 160), 8, 96, (31, 31)),
        Case("LTX VAE 3x7x7", 1, (16, 64, 96), 8, 64, (3, 7, 7)),
        Case("LTX VAE 3x5x5", 1, (16, 64, 96), 8, 64, (3, 5, 5)),
        Case("LTX VAE 11^3", 1, (16, 32, 48), 8, 64, (11, 11, 11)),
    ]
    large = [
        Case("Cosmos 16x44x80 stride", 1, (16, 44, 80), 16, 128, (16, 24, 16), stride=(16, 4, 16)),
        Case("Cosmos 16x44x80 dilation 1x11x5", 1, (16, 44, 80), 16, 128, (16, 4, 16), (1, 11, 5)),
        Case("FLUX 256^2 k80", 1, (256, 256), 24, 128, (80, 80)),
        Case("FLUX 256^2 k80 stride 16", 1, (256, 256), 24, 128, (80, 80), stride=(16, 16)),
        Case("Hunyuan 30x48x80", 1, (30, 48, 80), 24, 128, (18, 24, 24)),
        Case("Hunyuan 30x48x80 stride 16x8x8", 1, (30, 48, 80), 24, 128, (18, 24, 24), stride=(16, 8, 8)),
    ]
    return small if quick else small + large


SAMPLES = {f"paper-{rank}d": _paper(rank) for rank in (1, 2, 3)}

SUITES: dict[str, Callable[[bool], list[Case]]] = {
    "floors": _floors,
    "nat": _nat,
    "experiment-1": _experiment_1,
    "experiment-2": _experiment_2,
    "experiment-3": _experiment_3,
    "ablation-window": _ablation_window,
    "workloads": _workloads,
    **SAMPLES,
}


def suite(name: str, quick: bool = False) -> list[Case]:
    """The cases of suite `name`; `quick` for a selection that takes minutes.

    Raises:
        ValueError: no such suite.
    """
    if name not in SUITES:
        raise ValueError(f"suite={name!r}: there is no such suite; one of {', '.join(SUITES)}")
    return SUITES[name](quick)


def adapt(cases: Sequence[Case], batch: int | None = None, dtypes: Sequence[str] = ()) -> list[Case]:
    """The cases in another batch and in each of `dtypes`, where given: named after their dtype, each problem once."""
    if dtypes:
        cases = [
            case.replace(name=f"{case.name.removesuffix(f', {case.dtype}')}, {dtype}", dtype=dtype)
            for dtype in dtypes
            for case in cases
        ]
    if batch:
        cases = [case.replace(batch=batch) for case in cases]
    return list({case.key: case for case in cases}.values())
