"""Launch configurations of the SSD kernels: a pure function of headdim, d_state, dtype and architecture.

Nothing is tuned at run time: a first call compiles one kernel a shape family, every rank takes the same configuration,
and results repeat bitwise.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dualscan.ops import _triton

MAX_D_STATE = 256
# Compute capabilities with 99 KiB of shared memory a program; the data-centre ones have 163 KiB and more.
SMALL_SHARED_MEMORY = frozenset({(8, 6), (8, 9), (12, 0), (12, 1)})
# The kernels for Hopper GPUs: tokens and columns of a tile, states that they know, and chunks of a super-chunk, for
# each of which the backward has one state.
HOPPER_TILE = 64
HOPPER_STATES = (64, 128, 256)
HOPPER_EVERY = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Tile sizes and launch parameters.

    Attributes:
        chunk: tokens a chunk (Q).
        columns: columns of headdim a program of the sequential kernel holds.
        warps, stages: of the sequential kernel with outputs.
        states_warps, states_stages: of the sequential kernel that only writes states.
        gradient_rows: state columns a program of the gradient kernel holds.
        gradient_warps, gradient_stages: of the gradient kernel.
        precision: of float32 products ("ieee", "tf32x3"); lower precisions ignore it.
        validated: date of the check against float64 on the architecture, values and every gradient; None is
            arithmetic from the register and shared-memory limits only.
    """

    chunk: int
    columns: int
    warps: int
    stages: int
    states_warps: int
    states_stages: int
    gradient_rows: int
    gradient_warps: int
    gradient_stages: int
    precision: str = "tf32x3"
    validated: str | None = None


def power_of_two(n: int) -> int:
    """The smallest tile side that covers `n`; tensor cores need 16."""
    return max(16, 1 << (n - 1).bit_length())


def unsupported(dtype: torch.dtype, d_state: int) -> str | None:
    """Why the kernels cannot compute this shape family; None means that they can."""
    if dtype not in DTYPES:
        return f"the kernels compute float32, bfloat16 and float16, not {dtype}"
    if d_state > MAX_D_STATE:
        return f"d_state={d_state} is above {MAX_D_STATE}, the most that fits the registers"
    return None


def on_hopper(device: torch.device) -> bool:
    """Whether the GPU is one that Hopper's kernels were written for."""
    return device.type == "cuda" and _triton.capability(device)[0] == 9


def for_hopper(x: Tensor, B: Tensor) -> bool:
    """Whether sizes and dtype are those of Hopper's kernels; strides and alignment decide, too."""
    sizes = x.shape[3] % HOPPER_TILE == 0 and B.shape[3] in HOPPER_STATES
    return sizes and x.dtype in (torch.bfloat16, torch.float16) and on_hopper(x.device)


def saved_states(x: Tensor, B: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """The shape of the states that the forward may keep for the backward: (super-chunks, nheads, d_state, headdim)."""
    if x.numel() == 0 or not for_hopper(x, B):
        return (0,)
    long = HOPPER_TILE * HOPPER_EVERY
    batch, seqlen, nheads, headdim = x.shape
    supers = batch * -(-seqlen // long) if cu_seqlens is None else cu_seqlens.shape[0] - 1 + seqlen // long
    return supers, nheads, B.shape[3], headdim


@lru_cache(maxsize=256)
def choose(headdim: int, d_state: int, dtype: torch.dtype, capability: tuple[int, int]) -> Config:
    """The configuration of a shape family.

    Rows for Hopper were checked on an H200 (all three dtypes, d_state 1 to 256, headdim 1 to 128). The others
    follow from shared memory: an Ada, consumer Ampere or consumer Blackwell program has 99 KiB, too little to load the
    next chunk's tiles beside this one's. Ampere's 163 KiB and Blackwell's 227 KiB hold what Hopper's do.
    """
    n, p = power_of_two(d_state), power_of_two(headdim)
    wide, small = dtype == torch.float32, capability in SMALL_SHARED_MEMORY
    stages = 1 if wide or small else 2
    chunk = 32 if wide else 64
    return Config(
        chunk=chunk // 2 if small and n > 128 else chunk,
        columns=min(p, 32 if n > 128 or wide else 64),
        warps=4,
        stages=stages,
        states_warps=4,
        states_stages=stages,
        gradient_rows=min(n, 64 if wide else 128),
        gradient_warps=4,
        gradient_stages=stages,
        validated="2026-11-22" if capability[0] == 9 else None,
    )
