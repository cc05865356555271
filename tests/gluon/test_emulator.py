"""What the emulator of Gluon computes, and what it must catch: small kernels, wrong with one option changed."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.gluon import Hazard, run

SHARED = gl.NVMMASharedLayout(128, 16, 2)
ROWS = gl.BlockedLayout([1], [32], [4], [0])
BLOCKED = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
MMA = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
LINE = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
FACTOR = gl.constexpr(2.0)


def tiles(t: Tensor) -> Any:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [64, 64], SHARED)


def half(*shape: int) -> Tensor:
    return torch.randn(*shape).half()


@gluon.jit
def copy_kernel(source, target, WAIT: gl.constexpr, NBYTES: gl.constexpr, PHASE: gl.constexpr, STORED: gl.constexpr):
    smem = gl.allocate_shared_memory(source.dtype, [64, 64], source.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    row = gl.program_id(0) * 64
    mbarrier.expect(bar, NBYTES)
    tma.async_copy_global_to_shared(source, [row, 0], bar, smem)
    if WAIT:
        mbarrier.wait(bar, PHASE)
    tma.async_copy_shared_to_global(target, [row, 0], smem)
    tma.store_wait(STORED)


def copy(**options: Any) -> None:
    # The second tile is not whole: zeros are loaded, and not stored.
    source, target = half(100, 64), torch.empty(100, 64).half()
    constants = {"WAIT": True, "NBYTES": 8192, "PHASE": 0, "STORED": 0, **options}
    run(copy_kernel, (2,), (tiles(source), tiles(target)), **constants)
    assert torch.equal(source, target)


def test_copies() -> None:
    copy()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"WAIT": False}, "still on its way"),
        ({"PHASE": 1}, "still on its way"),
        ({"NBYTES": 8191}, "waits forever: 0 arrivals are missing, 8191 bytes are expected and 8192 are coming"),
        ({"STORED": 1}, "no store_wait"),
    ],
)
def test_copies_without_a_wait(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Hazard, match=message):
        copy(**options)


@gluon.jit
def pipelined_kernel(
    source, target, rows, PENDING: gl.constexpr, FENCE: gl.constexpr, BARRIER: gl.constexpr, AGAIN: gl.constexpr,
):  # fmt: skip
    """Doubles tiles of 64 rows: one is loaded while the one before is stored."""
    smem = gl.allocate_shared_memory(source.dtype, [2, 64, 64], source.layout)
    out = gl.allocate_shared_memory(source.dtype, [64, 64], target.layout)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(bars.index(slot), count=1)
    fetch(source, smem, bars, 0, True)
    if AGAIN:
        fetch(source, smem, bars, 0, True)
    count = gl.cdiv(rows, 64)
    for i in range(count):
        slot = i % 2
        mbarrier.wait(bars.index(slot), (i // 2) & 1)
        tile = smem.index(slot).load(BLOCKED).to(gl.float32) * FACTOR
        tma.store_wait(PENDING)
        out.store(tile.to(source.dtype))
        if FENCE:
            fence_async_shared()
        if BARRIER:
            gl.thread_barrier()
        fetch(source, smem, bars, i + 1, i + 1 < count)
        tma.async_copy_shared_to_global(target, [i * 64, 0], out)
    tma.store_wait(0)


@gluon.jit
def fetch(source, smem, bars, i, wanted):
    slot = i % 2
    mbarrier.expect(bars.index(slot), source.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(source, [i * 64, 0], bars.index(slot), smem.index(slot), pred=wanted)


def pipeline(**options: Any) -> None:
    source, target = half(256, 64), torch.empty(256, 64).half()
    constants = {"PENDING": 0, "FENCE": True, "BARRIER": True, "AGAIN": False, **options}
    run(pipelined_kernel, (1,), (tiles(source), tiles(target), 256), **constants)
    assert torch.equal(source * 2, target)


def test_pipeline() -> None:
    pipeline()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"PENDING": 1}, "stores to shared memory that a product or a copy still reads"),
        ({"FENCE": False}, "without fence_async_shared and then thread_barrier"),
        ({"BARRIER": False}, "without fence_async_shared and then thread_barrier"),
        ({"AGAIN": True}, "arrives once more"),
    ],
)
def test_pipeline_without_synchronisation(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Hazard, match=message):
        pipeline(**options)


@gluon.jit
def refill_kernel(source, target, BARRIER: gl.constexpr):
    smem = gl.allocate_shared_memory(source.dtype, [64, 64], source.layout)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(bars.index(slot), count=1)
    for i in gl.static_range(2):
        mbarrier.expect(bars.index(i), source.block_type.nbytes)
        tma.async_copy_global_to_shared(source, [64 * i, 0], bars.index(i), smem)
        mbarrier.wait(bars.index(i), 0)
        tile = smem.load(BLOCKED)
        row = gl.arange(0, 64, layout=gl.SliceLayout(1, BLOCKED))[:, None]
        column = gl.arange(0, 64, layout=gl.SliceLayout(0, BLOCKED))[None, :]
        gl.store(target + (64 * i + row) * 64 + column, tile)
        if BARRIER:
            gl.thread_barrier()


def test_refilled_memory() -> None:
    source, target = half(128, 64), torch.empty(128, 64).half()
    run(refill_kernel, (1,), (tiles(source), target), BARRIER=True)
    assert torch.equal(source, target)
    with pytest.raises(Hazard, match="other warps may still load: no thread_barrier"):
        run(refill_kernel, (1,), (tiles(source), target), BARRIER=False)


@gluon.jit
def reuse_kernel(source, target, BARRIER: gl.constexpr, ARRIVE: gl.constexpr):
    smem = gl.allocate_shared_memory(source.dtype, [2, 64, 64], source.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    for i in gl.static_range(2):
        if ARRIVE and i > 0:
            mbarrier.arrive(bar, count=1)
        else:
            mbarrier.expect(bar, source.block_type.nbytes)
        if BARRIER:
            gl.thread_barrier()
        tma.async_copy_global_to_shared(source, [64 * i, 0], bar, smem.index(i))
        mbarrier.wait(bar, i)
        row = gl.arange(0, 64, layout=gl.SliceLayout(1, BLOCKED))[:, None]
        column = gl.arange(0, 64, layout=gl.SliceLayout(0, BLOCKED))[None, :]
        gl.store(target + (64 * i + row) * 64 + column, smem.index(i).load(BLOCKED))


def test_reused_barrier() -> None:
    """Bytes may be expected before other warps have come from their wait, but no phase may be completed."""
    source, target = half(128, 64), torch.empty(128, 64).half()
    run(reuse_kernel, (1,), (tiles(source), target), BARRIER=True, ARRIVE=False)
    assert torch.equal(source, target)
    with pytest.raises(Hazard, match="starts a copy to an mbarrier that other warps may still wait on"):
        run(reuse_kernel, (1,), (tiles(source), target), BARRIER=False, ARRIVE=False)
    with pytest.raises(Hazard, match="arrives at an mbarrier that other warps may still wait on"):
        run(reuse_kernel, (1,), (tiles(source), target), BARRIER=True, ARRIVE=True)


@gluon.jit
def bits_kernel(source, mask, target):
    place = gl.arange(0, 256, layout=gl.BlockedLayout([2], [32], [4], [0]))
    x, bits = gl.load(source + place), gl.load(mask + place)
    kept = gl.inline_asm_elementwise(
        "and.b32 $0, $1, $2;", "=r,r,r", [x, bits], dtype=x.dtype, is_pure=True, pack=2
    )  # fmt: skip
    gl.store(target + place, kept)


def test_bits() -> None:
    source, target = half(256), torch.empty(256).half()
    source[::3] = float("nan")
    mask = torch.where(torch.arange(256) % 3 == 0, 0, -1).short()
    run(bits_kernel, (1,), (source, mask, target))
    assert torch.equal(target, source.nan_to_num(0.0))


@gluon.jit
def product_kernel(
    left, right, out, REGISTERS: gl.constexpr, SYNC: gl.constexpr, WAIT: gl.constexpr, OVERWRITE: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))[:, None]
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, MMA))[None, :]
    a_smem = gl.allocate_shared_memory(left.dtype.element_ty, [64, 64], SHARED)
    b_smem = gl.allocate_shared_memory(left.dtype.element_ty, [64, 64], SHARED)
    a = gl.load(left + row * 64 + column)
    a_smem.store(a)
    b_smem.permute((1, 0)).store(gl.load(right + row * 64 + column))
    if SYNC == "fence, barrier":
        fence_async_shared()
    gl.thread_barrier()
    if SYNC == "barrier, fence":
        fence_async_shared()
    zero = gl.zeros([64, 64], gl.float32, MMA)
    operand = gl.convert_layout(a, LAYOUT) if REGISTERS else a_smem
    y = warpgroup_mma(operand, b_smem.permute((1, 0)), zero, use_acc=False, is_async=True)
    y = warpgroup_mma(operand, b_smem.permute((1, 0)), y, is_async=True)
    if OVERWRITE:
        b_smem.store(a)
    if WAIT == 0:
        y = warpgroup_mma_wait(0, deps=[y])
    if WAIT == 1:
        y = warpgroup_mma_wait(1, deps=[y])
    gl.store(out + row * 64 + column, y)


def product(**options: Any) -> None:
    left, right, out = half(64, 64), half(64, 64), torch.empty(64, 64)
    constants = {"REGISTERS": False, "SYNC": "fence, barrier", "WAIT": 0, "OVERWRITE": False}
    layout = gl.DotOperandLayout(0, MMA, 2)
    run(product_kernel, (1,), (left, right, out), **{**constants, "LAYOUT": layout, **options})
    torch.testing.assert_close(out, 2 * left.float() @ right.float())


@pytest.mark.parametrize("registers", [False, True])
def test_products(registers: bool) -> None:
    product(REGISTERS=registers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"SYNC": ""}, "a product reads what was stored without fence_async_shared"),
        ({"SYNC": "barrier, fence"}, "a product reads what was stored without fence_async_shared and then"),
        ({"WAIT": None}, "used before warpgroup_mma_wait"),
        ({"WAIT": 1}, "used before warpgroup_mma_wait"),
        ({"OVERWRITE": True}, "stores to shared memory that a product or a copy still reads"),
    ],
)
def test_products_without_synchronisation(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Hazard, match=message):
        product(**options)


def test_layouts_of_products() -> None:
    with pytest.raises(ValueError, match="not DotOperandLayout"):
        product(REGISTERS=True, LAYOUT=BLOCKED)


@gluon.jit
def gather_kernel(source, target, n, MASK: gl.constexpr, STEP: gl.constexpr, SHIFT: gl.constexpr):
    i = gl.arange(0, 128, layout=ROWS)
    mask = i < n if MASK else None
    smem = gl.allocate_shared_memory(gl.float32, [128], LINE)
    async_copy.async_copy_global_to_shared(smem, source + i * STEP, mask=mask)
    async_copy.commit_group()
    async_copy.wait_group(0)
    gl.store(target + i + SHIFT, smem.load(ROWS), mask=mask)


@pytest.mark.parametrize(
    ("programs", "options", "error", "message"),
    [
        (1, {"MASK": False}, IndexError, "a program reads element 200 of a tensor of"),
        (1, {"STEP": 1}, IndexError, "a program reads element 1 of a tensor of"),
        (1, {"SHIFT": 1}, IndexError, "a program writes element 100 of a tensor of"),
        (1, {"SHIFT": -1}, IndexError, "a program writes element -1 of a tensor of"),
        (2, {}, Hazard, "a program writes what another program"),
    ],
)
def test_pointers(programs: int, options: dict[str, Any], error: type[Exception], message: str) -> None:
    # Of every second element; those between are not the tensor's.
    source, target = torch.randn(100, 2)[:, 0], torch.empty(100)
    constants = {"MASK": True, "STEP": 2, "SHIFT": 0}
    run(gather_kernel, (1,), (source, target, 100), **constants)
    assert torch.equal(source, target)
    with pytest.raises(error, match=message):
        run(gather_kernel, (programs,), (source, target, 100), **{**constants, **options})


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def affine(a, b, c, d):
    return a * c, b * c + d


@gluon.jit
def arithmetic_kernel(out, sums, scans, n, x):
    i = gl.arange(0, 8, layout=ROWS)
    gl.store(out + i, (i - n) // 2)
    gl.store(out + 8 + i, (i - n) % 2)
    gl.store(out + 16 + i, gl.where(i >= n, gl.maximum(i, 5), gl.minimum(i, 2)).to(gl.float32) / x)
    gl.store(out + 24 + i, (i.to(gl.float16) * 0.1).to(gl.float32))
    gl.store(out + 32 + i, ((i << 1) ^ 3) & ~4 | (i == 2).to(gl.int32))
    gl.store(sums, gl.sum(i))
    gl.store(sums + 1, gl.reduce(i, 0, add))
    gl.store(sums + 2, gl.max(i, 0) - gl.min(i, 0))
    for k in range(n):
        gl.store(sums + 3 + k, gl.load(sums + k, mask=k < 2, other=9))
    gl.store(scans + i, gl.associative_scan(i, 0, add, reverse=True))
    scale, shift = gl.associative_scan((i + 1, i), 0, affine)
    gl.store(scans + 8 + i, scale)
    gl.store(scans + 16 + i, shift)


def test_arithmetic() -> None:
    out, sums, scans = torch.empty(5, 8), torch.zeros(6, dtype=torch.int32), torch.zeros(3, 8, dtype=torch.int32)
    run(arithmetic_kernel, (1,), (out, sums, scans, 3, 4.0))
    i = torch.arange(8)
    # Integers are divided as in C.
    assert out[0].tolist() == [-1, -1, 0, 0, 0, 1, 1, 2]
    assert out[1].tolist() == [-1, 0, -1, 0, 1, 0, 1, 0]
    assert out[2].tolist() == [0, 0.25, 0.5, 1.25, 1.25, 1.25, 1.5, 1.75]
    assert torch.equal(out[3], (i.half() * torch.tensor(0.1).half()).float())
    assert out[4].tolist() == [((k << 1) ^ 3) & ~4 | (k == 2) for k in range(8)]
    assert sums.tolist() == [28, 28, 7, 28, 28, 9]
    assert scans[0].tolist() == i.flip(0).cumsum(0).flip(0).tolist()
    scale, shift = 1, 0
    for k in range(8):
        scale, shift = scale * (k + 1), shift * (k + 1) + k
        assert (scans[1, k], scans[2, k]) == (scale, shift)


@gluon.jit
def faces_kernel(out, FIRST: gl.constexpr, SECOND: gl.constexpr):
    i = gl.arange(0, 64, layout=ROWS)
    short = gl.allocate_shared_memory(gl.float16, [2, 64], LINE)
    long = short._reinterpret(gl.float32, [64], LINE)
    if FIRST:
        short.index(0).store(i.to(gl.float16))
    if SECOND:
        long.store(i.to(gl.float32))
    gl.store(out + i, short.index(0).load(ROWS).to(gl.float32))
    gl.store(out + 64 + i, long.load(ROWS))


@pytest.mark.parametrize(("first", "second"), [(False, False), (True, False), (False, True), (True, True)])
def test_reinterpreted_memory(first: bool, second: bool) -> None:
    # What one view writes is lost to the other; what nobody writes is NaN.
    out = torch.empty(2, 64)
    run(faces_kernel, (1,), (out,), FIRST=first, SECOND=second)
    for row, written in zip(out, (first and not second, second), strict=True):
        assert torch.equal(row, torch.arange(64.0)) if written else row[:32].isnan().all()
    assert out[1, 32:].isnan().all() == (not second)


@gluon.jit
def refused_kernel(out, n, CASE: gl.constexpr):
    i = gl.arange(0, 64, layout=ROWS)
    if CASE == "layouts":
        gl.store(out + i, gl.arange(0, 64, layout=gl.SliceLayout(0, BLOCKED)))
    elif CASE == "slices":
        gl.store(out + i, i[:, None])
    elif CASE == "constants":
        wants_constant(n)
    elif CASE == "branches":
        if i == 0:
            gl.store(out, n)
    elif CASE == "exponents":
        gl.store(out + i, gl.exp2(i))
    elif CASE == "shared":
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()).store(i)
    else:
        gl.atomic_add(out, 1.0)


@gluon.jit
def wants_constant(N: gl.constexpr):
    return N


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("layouts", ValueError, "layouts differ"),
        ("slices", ValueError, "a new dimension 1 needs a SliceLayout"),
        ("constants", TypeError, "N of wants_constant is a constexpr"),
        ("branches", TypeError, "a condition must be a scalar"),
        ("exponents", ValueError, "exp2 takes float32"),
        ("shared", ValueError, r"\[64\] torch.int32 stored to \[1\] torch.int64"),
        ("", NotImplementedError, r"the emulator has no triton.experimental.gluon.language.atomic_add"),
    ],
)
def test_refuses(case: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        run(refused_kernel, (1,), (torch.empty(64), 3), CASE=case)
    assert raised.value.__notes__ == ["in program (0, 0, 0) of refused_kernel"]


def test_descriptors_are_checked() -> None:
    odd = torch.zeros(65 * 64).half()[1:-63].view(64, 64)
    with pytest.raises(AssertionError, match="aligned"):
        tiles(odd)
    described = tiles(torch.zeros(64, 64).half())
    described.base = odd
    with pytest.raises(AssertionError, match="aligned"):
        run(copy_kernel, (1,), (described, described), WAIT=True, NBYTES=8192, PHASE=0, STORED=0)
