"""`gluon.language.nvidia.hopper`: products of warpgroups, and the fence between ordinary stores and all others."""

from typing import Any

import torch
from torch import Tensor

from tests.gluon.shared import Pending, Product, Program, Shared
from tests.gluon.values import Value


def fence_async_shared(cluster: Any = False) -> None:
    if cluster:
        raise NotImplementedError("the emulator has no clusters")
    Program.running.fence()


def warpgroup_mma(
    a: Any, b: Any, acc: Any, *, use_acc: Any = True, precision: Any = None, max_num_imprecise_acc: Any = None,
    is_async: Any = False,
) -> Value:  # fmt: skip
    """`acc + a b` in float32. A product in flight adds to another's result only by way of `acc`."""
    program = Program.running
    _check_layouts(a, b, acc)
    left, right = (x.contents() if isinstance(x, Shared) else x.data for x in (a, b))
    start = acc.product.result if isinstance(acc, Pending) else acc.data
    if left.dtype != right.dtype or left.dtype not in (torch.float16, torch.bfloat16):
        raise NotImplementedError(f"the emulator has no product of {left.dtype} and {right.dtype}")
    if (*left.shape[:-1], right.shape[-1]) != tuple(start.shape) or left.shape[1] != right.shape[0]:
        raise ValueError(f"shapes {list(left.shape)} and {list(right.shape)} for {list(start.shape)}")
    warps = acc.layout.warps_per_cta
    if warps[0] * warps[1] != program.launch.num_warps:
        raise ValueError(f"{acc.layout} is not for {program.launch.num_warps} warps")
    if start.shape[0] % (16 * warps[0]) or start.shape[1] % (acc.layout.instr_shape[1] * warps[1]):
        raise ValueError(f"{list(start.shape)} is no multiple of the instruction's shape: {acc.layout}")
    operands = [x for x in (a, b) if isinstance(x, Shared)]
    for memory in operands:
        program.read_async(memory, "a product reads")
    result: Tensor = left.float() @ right.float()
    product = Product(operands, result + start if use_acc else result, acc.layout)
    program.products.append(product)
    if is_async:
        return Pending(product)
    program.wait_products(0)
    return Value(product.result, product.layout)


def _check_layouts(a: Any, b: Any, acc: Any) -> None:
    def name(x: Any) -> str:
        return type(x.layout).__name__

    if name(acc) != "NVMMADistributedLayout" or list(acc.layout.version) != [3, 0]:
        raise ValueError(f"the accumulator's layout is {acc.layout}, not NVMMADistributedLayout([3, 0], ...)")
    if not isinstance(b, Shared) or name(b) != "NVMMASharedLayout":
        raise ValueError(f"the right operand is in shared memory with an NVMMASharedLayout, not {b!r}")
    if isinstance(a, Shared):
        if name(a) != "NVMMASharedLayout":
            raise ValueError(f"the left operand's layout in shared memory is {a.layout}, not NVMMASharedLayout")
    elif name(a) != "DotOperandLayout" or a.layout.operand_index != 0:
        raise ValueError(f"the left operand's layout in registers is {a.layout}, not DotOperandLayout(0, ...)")
    elif list(a.layout.parent.warps_per_cta) != list(acc.layout.warps_per_cta):
        raise ValueError(f"the left operand's layout {a.layout} is not one of {acc.layout}")


def mma_v2(a: Value, b: Value, acc: Value, input_precision: Any = None) -> Value:
    for index, operand in enumerate((a, b)):
        layout: Any = operand.layout
        if type(layout).__name__ != "DotOperandLayout" or (layout.operand_index, layout.parent) != (index, acc.layout):
            raise ValueError(f"operand {index} of mma_v2 has the layout {layout}, not DotOperandLayout({index}, ...)")
    return Value(a.data.float() @ b.data.float() + acc.data, acc.layout)


def warpgroup_mma_init(value: Value) -> Value:
    return value


def warpgroup_mma_wait(num_outstanding: Any = 0, deps: Any = None) -> Any:
    """The results of `deps`, of which those still in flight stay so."""
    if deps is None:
        raise ValueError("warpgroup_mma_wait deps must be given")
    Program.running.wait_products(int(num_outstanding))
    results = [Value(x.product.result, x.layout) if isinstance(x, Pending) and x.product.done else x for x in deps]
    return results[0] if len(results) == 1 else tuple(results)
