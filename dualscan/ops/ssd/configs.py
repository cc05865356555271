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

# Bytes of chunk states that the backward keeps at once: for whole groups of heads, which cost nothing to take one after
# the other, and for parts of one, which cost a tenth of the time and more. And the step of such parts: 16 bytes of the
# narrowest dtype.
SCRATCH = 2**28
SCRATCH_OF_A_GROUP = 2**31
HEADS_STEP = 8
# Where the forward was asked to keep no states, the backward takes as many rows of the batch at a time as so many bytes
# of chunk states allow.
SCRATCH_OF_ROWS = 40 * 2**20


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


def rows_at_once(x: Tensor, B: Tensor) -> int:
    """Rows of the batch that the backward takes at a time where memory is to be saved."""
    return min(max(SCRATCH_OF_ROWS // _chunk_states(x[:1], B), 1), x.shape[0])


def slices_of_heads(x: Tensor, B: Tensor, nseq: int, resident: int) -> list[tuple[int, int]]:
    """Ranges of heads that the backward takes one after the other, because of the chunk states that it keeps.

    A multiprocessor holds `resident` programs of the sequential kernel.
    """
    nheads, ngroups = x.shape[2], B.shape[2]
    programs, slots = nseq * _triton.cdiv(x.shape[3], _tile(x, B)[1]), resident * _triton.multiprocessors(x.device)
    most = _heads_at_once(nheads, nheads // ngroups, programs, _chunk_states(x, B) // nheads, slots)
    return head_slices(nheads, ngroups, most)


def _tile(x: Tensor, B: Tensor) -> tuple[int, int]:
    """Tokens that the backward has one state for, and columns of headdim that a program holds."""
    if for_hopper(x, B):
        return HOPPER_TILE * HOPPER_EVERY, HOPPER_TILE
    config = choose(x.shape[3], B.shape[3], x.dtype, _triton.capability(x.device))
    return config.chunk, config.columns


def _chunk_states(x: Tensor, B: Tensor) -> int:
    """Bytes of the states S and G that the backward keeps at once."""
    (batch, seqlen, nheads, headdim), (tokens, columns) = x.shape, _tile(x, B)
    width = _triton.cdiv(headdim, columns) * columns
    one = 2 * power_of_two(B.shape[3]) * width * x.element_size()
    return nheads * _triton.cdiv(batch * seqlen, tokens) * one


def _heads_at_once(nheads: int, per_group: int, programs: int, nbytes: int, slots: int) -> int:
    """Heads in a slice, of which each has `programs` and keeps `nbytes`: all, where `SCRATCH` holds them.

    Else as many as fill the multiprocessors once; or, where sequences are split because all do not fill them, as many
    as the scratch memory holds. Parts of a group only where there is no other way.
    """
    if nheads * nbytes <= SCRATCH:
        return nheads
    heads = slots // programs if nheads * programs >= slots else SCRATCH // nbytes
    if heads >= per_group:
        return min(heads // per_group * per_group, nheads)
    if per_group * nbytes <= SCRATCH_OF_A_GROUP:
        return per_group
    heads = SCRATCH_OF_A_GROUP // nbytes
    return min(max(heads // HEADS_STEP, 1) * HEADS_STEP, per_group)


def head_slices(nheads: int, ngroups: int, most: int) -> list[tuple[int, int]]:
    """Ranges of at most `most` heads: whole groups, or parts of one."""
    per_group = nheads // ngroups
    if most >= per_group:
        size = most // per_group * per_group
        return [(first, min(first + size, nheads)) for first in range(0, nheads, size)]
    starts = [(group, first) for group in range(0, nheads, per_group) for first in range(0, per_group, most)]
    return [(group + first, group + min(first + most, per_group)) for group, first in starts]
