"""The residual block around any mixer, and one token through a stack of blocks."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from dualscan.nn.mamba2 import Mamba2, Mamba2State, needs_operators
from dualscan.nn.norm import RMSNorm, add_and_norm, adds_in_norms
from dualscan.nn.step import Watch, describe, make_plan
from dualscan.ops import _triton
from dualscan.ops._launch import DTYPES
from dualscan.ops._recompute import Recompute, check_recompute, recomputed, recomputes_activations

if TYPE_CHECKING:
    from dualscan.ops.decode.numba_step import Plan, Table

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
        self.recompute: Recompute = "none"  # set by `set_recompute`

    def forward(self, h: Tensor, state: Any = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        """Adds the mixer's output to `(batch, seqlen, d_model)` and passes its state on."""
        y, state = self.branch(h, state, cu_seqlens)
        return h + y, state

    def branch(self, h: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        """mixer(RMSNorm(h)), of which the graph keeps as much as `recompute` says."""
        if self.recompute == "block" and torch.is_grad_enabled():
            return checkpoint(self._branch, h, state, cu_seqlens, use_reentrant=False, preserve_rng_state=False)
        return self._branch(h, state, cu_seqlens)

    def _branch(self, h: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        if not recomputes_activations(self.recompute):
            return self._mix(self.norm(h).to(self.compute_dtype), None, state, cu_seqlens)
        dtype = self._product_dtype(h)

        def normed() -> Tensor:
            return self.norm(h).to(dtype)

        return self._mix(normed(), normed, state, cu_seqlens)

    def follow(
        self, h: Tensor, waiting: Tensor | None, state: Any, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Any]:
        """`forward(h + waiting)` without its last sum: the norm adds what waited, and the block's output waits in turn.

        Returns:
            h + waiting, what is to be added to it, and the state.
        """
        dtype = self._product_dtype(h)
        h, u = add_and_norm(self.norm, h, waiting, dtype)
        again = partial(self._normed, h, dtype) if recomputes_activations(self.recompute) else None
        return h, *self._mix(u, again, state, cu_seqlens)

    def _normed(self, h: Tensor, dtype: torch.dtype) -> Tensor:
        return add_and_norm(self.norm, h, None, dtype)[1]

    def _mix(
        self, u: Tensor, again: Callable[[], Tensor] | None, state: Any, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Any]:
        """What the block adds to the residual stream; the graph keeps `again`, where there is one, in place of u."""
        if again is None:
            return self.mixer(u, state, cu_seqlens)
        with recomputed(u, again):
            return self.mixer(u, state, cu_seqlens)

    def _product_dtype(self, h: Tensor) -> torch.dtype:
        """The dtype that the mixer's first product takes: one that keeps its input then keeps no cast of it."""
        autocast = torch.is_autocast_enabled(h.device.type)
        return torch.get_autocast_dtype(h.device.type) if autocast else self.compute_dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the mixer's matrices; the residual stream itself stays in float32."""
        return self.mixer.get_parameter("out_proj.weight").dtype


def set_recompute(model: nn.Module, recompute: Recompute) -> None:
    """Sets what the backward of every block computes again instead of keeping it; see `Mamba2` for the values.

    Args:
        model: any module with `Block`s in it.
        recompute: "none", "convolution", "activations" or "block"; of mixers other than Mamba-2, "activations" only
            drops the input, which is normalised again, and "convolution" nothing.

    Raises:
        ValueError: another value.
    """
    recompute = check_recompute(recompute)
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = recompute
        elif isinstance(module, Mamba2):
            module.recompute = "none" if recompute == "block" else recompute


def keep_in(dtype: torch.dtype | None, state: Any) -> Any:
    """Any states, with the SSM states of Mamba-2 layers in `dtype`; None leaves all as they are.

    The states of convolutions are inputs as they came, and those of other layers stay as they are too.

    Raises:
        ValueError: another dtype than float32 and bfloat16.
    """
    if dtype is None:
        return state
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"state_dtype={dtype}; SSM states are kept in torch.float32 or torch.bfloat16.")
    if type(state) is StepStates:
        state = tuple(state)

    def keep(node: Any) -> Any:
        return node._replace(ssm=node.ssm.to(dtype)) if isinstance(node, Mamba2State) else node

    return pytree.tree_map(keep, state, is_leaf=lambda node: isinstance(node, Mamba2State))


def read_blocks(
    blocks: Iterable[Any],
    h: Tensor,
    states: Sequence[Any],
    cu_seqlens: Tensor | None,
    state_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, tuple[Any, ...]]:
    """A sequence through the blocks of a model; on a GPU a block's output waits for the next norm, which adds it.

    Args:
        blocks: in their order; called, unless that is the same as `Block.follow`.
        h: `(batch, seqlen, d_model)`, the residual stream.
        states: one a block.
        cu_seqlens: as in `Block.forward`.
        state_dtype: as in `keep_in`, for the next states.

    Returns:
        The residual stream, what is still to be added to it (None: nothing), and the next states.
    """
    waiting, after, late = None, [], adds_in_norms(h)
    for block, state in zip(blocks, states, strict=True):
        if late and _may_follow(block):
            h, waiting, state = block.follow(h, waiting, state, cu_seqlens)
        else:
            h, waiting = h if waiting is None else h + waiting, None
            h, state = block(h, state, cu_seqlens)
        after.append(keep_in(state_dtype, state))
    return h, waiting, tuple(after)


def _may_follow(block: Any) -> bool:
    """Whether `Block.follow` does what calling the block does, and keeps no more for the backward."""
    if not isinstance(block, Block) or type(block).forward is not Block.forward or "forward" in block.__dict__:
        return False
    if block._forward_hooks or block._forward_pre_hooks or block._backward_hooks or block._backward_pre_hooks:
        return False
    return block._compiled_call_impl is None and not (block.recompute == "block" and torch.is_grad_enabled())


class StepStates(tuple[Any, ...]):
    """The states of a stack of Mamba-2 blocks where the last step left them; a copy is a plain tuple.

    A step that is given them and may reuse them finds its table ready: it does nothing a layer in Python.
    """

    plan: "Plan"
    table: "Table"

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (tuple(self),)


def step_blocks(
    blocks: nn.ModuleList, h: Tensor, states: Sequence[Any], *, reuse_state: bool = False
) -> tuple[Tensor, tuple[Any, ...]]:
    """One token through the blocks of a model; a run of Mamba-2 blocks goes through one kernel where that is possible.

    Args:
        blocks: in their order.
        h: `(batch, 1, d_model)`, the residual stream.
        states: one a block; not modified, unless `reuse_state`.
        reuse_state: the next states may take the place of the given ones.

    Returns:
        The residual stream after the last block, and the next states.
    """
    if reuse_state and h.is_cuda and _runs_on_gpu(blocks, h):
        return _step_on_gpu(blocks, h, states)
    if h.device.type != "cpu" or h.dtype != torch.float32 or needs_operators(h) or torch.compiler.is_compiling():
        return _step_run(blocks, None, h, states)
    runs = _runs(blocks)
    if len(runs) == 1 and reuse_state and runs[0][1] is not None:
        return _step_in_place(blocks, runs[0][1], h, states)
    after: tuple[Any, ...] = ()
    for length, plan in runs:
        span = slice(len(after), len(after) + length)
        h, run_states = _step_run(blocks[span], plan, h, states[span], reuse_state)
        after += run_states
    return h, after


def _step_in_place(
    blocks: nn.ModuleList, plan: "Plan", h: Tensor, states: Sequence[Any]
) -> tuple[Tensor, tuple[Any, ...]]:
    """A step of a whole model that may reuse the states, which know where they are from the second one on."""
    if type(states) is StepStates and states.plan is plan and states[0].ssm.shape[0] == h.shape[0]:
        return plan.run(h[:, 0], states.table, states[0].ssm.dtype).unsqueeze(1), states
    stepped = plan.step(h[:, 0], states, reuse_state=True)
    if stepped is None:
        return _step_run(blocks, None, h, states)
    after = StepStates(Mamba2State(*state) for state in stepped[1])
    after.plan, after.table = plan, plan.prepare(after, reuse_state=True)[0]
    return stepped[0].unsqueeze(1), after


def _runs_on_gpu(blocks: nn.ModuleList, h: Tensor) -> bool:
    return (
        _triton.obstacle(h.device) is None
        and h.dtype == torch.float32
        and not needs_operators(h)
        and not torch.compiler.is_compiling()
        and any(map(_may_merge, blocks))
    )


def _step_on_gpu(blocks: Iterable[Any], h: Tensor, states: Sequence[Any]) -> tuple[Tensor, tuple[Any, ...]]:
    """A step that changes the states of Mamba-2 blocks where they are; a block's output waits for the next norm."""
    from dualscan.ops.decode import triton_step

    stream, waiting, after = h[:, 0], None, []
    for block, state in zip(blocks, states, strict=True):
        if _may_merge(block) and block.mixer.in_proj.weight.dtype in DTYPES:
            layer, sizes = describe(block.mixer, block.norm)
            if isinstance(state, Mamba2State):  # else it is deferred
                conv = state.conv.to(layer.in_weight.dtype).transpose(1, 2).contiguous().transpose(1, 2)
                state = Mamba2State(conv, state.ssm.contiguous())
            stream, waiting = triton_step.step(stream, waiting, layer, sizes, *state)
        else:
            stream = triton_step.settle(stream, waiting)
            (h, state), waiting = block(stream.unsqueeze(1), state), None
            stream = h[:, 0]
        after.append(state)
    triton_step.count(after)
    return triton_step.settle(stream, waiting).unsqueeze(1), tuple(after)


def _step_run(
    blocks: Iterable[nn.Module], plan: "Plan | None", h: Tensor, states: Sequence[Any], reuse_state: bool = False
) -> tuple[Tensor, tuple[Any, ...]]:
    stepped = None if plan is None else plan.step(h[:, 0], states, reuse_state=reuse_state)
    if stepped is not None:
        return stepped[0].unsqueeze(1), tuple(Mamba2State(*state) for state in stepped[1])
    after = []
    for block, state in zip(blocks, states, strict=True):
        h, state = block(h, state)
        after.append(state)
    return h, tuple(after)


def _runs(blocks: nn.ModuleList) -> "list[tuple[int, Plan | None]]":
    """The blocks as runs, each with its length and its plan if it is one of Mamba-2 blocks; they are planned once."""
    known = _STACKS.get(blocks)
    if known is None or not known[0].unchanged():
        merged, runs = [], []
        for mergeable, group in groupby(blocks, _may_merge):
            run: list[Any] = list(group)
            merged += [module for block in run if mergeable for module in _called(block)]
            runs.append((len(run), make_plan([(block.mixer, block.norm) for block in run]) if mergeable else None))
        known = _STACKS[blocks] = Watch(blocks, merged), runs
    return known[1]


def _may_merge(block: nn.Module) -> bool:
    """Whether the kernel does the same as calling the block and the modules in it, which runs their hooks."""
    if type(block) is not Block or type(block.mixer) is not Mamba2 or not block.mixer.steps_directly:
        return False
    return not any(module._forward_hooks or module._forward_pre_hooks for module in _called(block))


def _called(block: Any) -> tuple[nn.Module, ...]:
    return block, block.norm, block.mixer, block.mixer.in_proj, block.mixer.out_proj
