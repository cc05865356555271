"""The update of AdamW as one launch a group of parameters, where Triton runs; see `triton_adamw`.

It changes what `torch.optim.AdamW` would, in the same tensors, so that states are saved, loaded and updated by either.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops._launch import ALIGNMENT
from dualscan.train.runtime import sent

# Options of AdamW under which it does something else.
_OTHER = ("amsgrad", "maximize", "capturable", "differentiable")


class _Table(NamedTuple):
    """Where the tensors of a group are, on the device; and what it was made from."""

    pointers: list[int]
    programs: list[int]
    table: Tensor
    owners: Tensor


class Update:
    """The update of an optimizer that `runs` accepts.

    Args:
        optimizer: not changed; its states and its parameters are.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._tables: dict[int, _Table] = {}

    @staticmethod
    def runs(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
        """Whether this does what the optimizer does on the device."""
        if type(optimizer) is not torch.optim.AdamW or _triton.obstacle(device) is not None:
            return False
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return False
        return not any(any(group[name] for name in _OTHER) for group in optimizer.param_groups)

    def __call__(self, divisor: Tensor, skip: Tensor) -> bool:
        """Updates, unless a tensor is not as the kernel wants it.

        Args:
            divisor: `()` float32, what the gradients are divided by first.
            skip: `()` float32; 1 leaves everything as it is.

        Returns:
            Whether it did: not at the first step, which makes the states, nor with other dtypes.
        """
        groups = [[p for p in group["params"] if p.grad is not None] for group in self._optimizer.param_groups]
        if not all(self._takes(p) for members in groups for p in members):
            return False
        for i, members in enumerate(groups):
            if members:
                self._update(i, members, divisor, skip)
        return True

    def _takes(self, p: Tensor) -> bool:
        state, grad = self._optimizer.state.get(p, {}), p.grad
        if not {"step", "exp_avg", "exp_avg_sq"} <= state.keys() or grad is None or state["step"].device != p.device:
            return False
        return all(
            t.dtype == torch.float32 and not t.is_sparse and t.is_contiguous() and t.data_ptr() % ALIGNMENT == 0
            for t in (p, grad, state["exp_avg"], state["exp_avg_sq"])
        )

    def _update(self, group: int, members: Sequence[Tensor], divisor: Tensor, skip: Tensor) -> None:
        from dualscan.train.step import triton_adamw

        options: dict[str, Any] = self._optimizer.param_groups[group]
        states = [self._optimizer.state[p] for p in members]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, [1 - skip] * len(steps))
        table = self._table(group, members, states)
        triton_adamw.adamw(
            *(table.table, table.owners, divisor, skip),
            lr=float(options["lr"]),
            betas=options["betas"],
            eps=options["eps"],
            decay=options["weight_decay"],
        )
        # What a kernel writes, autograd does not see.
        torch.autograd.graph.increment_version(
            [t for p, s in zip(members, states, strict=True) for t in (p, s["exp_avg"], s["exp_avg_sq"])]
        )

    def _table(self, group: int, members: Sequence[Tensor], states: Sequence[dict[str, Tensor]]) -> _Table:
        """The table of a group; its own, as long as every tensor stays where it is."""
        from dualscan.train.step.triton_adamw import COLUMNS, blocks

        pointers, first, programs = [], 0, []
        for p, state in zip(members, states, strict=True):
            assert p.grad is not None
            tensors = p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]
            pointers += [*(t.data_ptr() for t in tensors), p.numel(), first]
            programs.append(blocks(p.numel()))
            first += programs[-1]
        known = self._tables.get(group)
        if known is None or known.pointers != pointers:
            device = members[0].device
            table = sent(torch.tensor(pointers).view(-1, COLUMNS), device)
            if known is not None and known.programs == programs:
                owners = known.owners
            else:
                rows = torch.arange(len(programs), dtype=torch.int32)
                owners = sent(rows.repeat_interleave(torch.tensor(programs)), device)
            known = self._tables[group] = _Table(pointers, programs, table, owners)
        return known
