"""The residual block around any mixer, and one token through a stack of blocks."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dualscan.nn.mamba2 import Mamba2, Mamba2State, needs_operators
from dualscan.nn.norm import RMSNorm
from dualscan.nn.step import Watch, make_plan
from dualscan.ops import decode

if TYPE_CHECKING:
    from dualscan.ops.decode.numba_step import Plan

# What is known of stacks of blocks: how they were, and their runs.
_STACKS: "WeakKeyDictionary[nn.ModuleList, tuple[Watch, list[tuple[int, Plan | None]]]]" = WeakKeyDictionary()


class Block(nn.Module):
    """Pre-norm residual: h + mixer(RMSNorm(h)), with the residual stream h in float32.

    Args:
        d_model: width of the residual stream.
        mixer: `forward(u, state, cu_seqlens) -> (y, state)`; its last matrix is called `out_proj`.
        norm_eps: epsilon of the norm.
    """

    def __init__(self, d_model: int, mixer: nn.Module, *, norm_eps: float = 1e-5):
        super().__init__()
        self.norm = RMSNorm(d_model, eps=norm_eps)
        self.mixer = mixer

    def forward(self, h: Tensor, state: Any = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        """Adds the mixer's output to `(batch, seqlen, d_model)` and passes its state on."""
        y, state = self.mixer(self.norm(h).to(self.compute_dtype), state, cu_seqlens)
        return h + y, state

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the mixer's matrices; the residual stream itself stays in float32."""
        return self.mixer.get_parameter("out_proj.weight").dtype


def step_blocks(
    blocks: nn.ModuleList, h: Tensor, states: Sequence[Any], *, reuse_state: bool = False
) -> tuple[Tensor, list[Any]]:
    """One token through the blocks of a model; a run of Mamba-2 blocks goes through one kernel where that is possible.

    Args:
        blocks: in their order.
        h: `(batch, 1, d_model)`, the residual stream.
        states: one a block; not modified, unless `reuse_state`.
        reuse_state: the next states may take the place of the given ones.

    Returns:
        The residual stream after the last block, and the next states.
    """
    after: list[Any] = []
    direct = h.dtype == torch.float32 and not needs_operators(h) and not torch.compiler.is_compiling()
    for length, plan in _runs(blocks) if direct else [(len(blocks), None)]:
        begin = len(after)
        end = begin + length
        stepped = None if plan is None else decode.step(plan, h[:, 0], states[begin:end], reuse_state=reuse_state)
        if stepped is not None:
            h = stepped[0].unsqueeze(1)
            after += [Mamba2State(*state) for state in stepped[1]]
            continue
        for block, state in zip(blocks[begin:end], states[begin:end], strict=True):
            h, state = block(h, state)
            after.append(state)
    return h, after


def _runs(blocks: nn.ModuleList) -> "list[tuple[int, Plan | None]]":
    """The blocks as runs, each with its length and its plan if it is one of Mamba-2 blocks; they are planned once."""
    known = _STACKS.get(blocks)
    if known is None or not known[0].unchanged():
        merged, runs = [], []
        for mergeable, group in groupby(blocks, _may_merge):
            run: list[Any] = list(group)
            merged += [(block, block.norm, block.mixer) for block in run if mergeable]
            runs.append((len(run), make_plan([(block.mixer, block.norm) for block in run]) if mergeable else None))
        known = _STACKS[blocks] = Watch(blocks, [module for modules in merged for module in modules]), runs
    return known[1]


def _may_merge(block: nn.Module) -> bool:
    """Whether a kernel does the same as calling the block and the modules in it, which runs their hooks."""
    if type(block) is not Block or type(block.mixer) is not Mamba2 or not block.mixer.plain:
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks for m in (block, block.norm, block.mixer))
