"""The join of segments against its recurrence, where there are more of them than are loaded at once."""

import pytest
import torch
from torch import Tensor

from dualscan.ops import _triton
from tests.oracle import assert_close
from tests.strategies import packed

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if not CUDA:
    pytestmark = pytest.mark.usefixtures("interpreter")

CHUNK, SEGMENT, HEADS, WIDTH = 16, 32, 2, 70


def recurrence(plan: _triton.Plan, ends: Tensor, decays: Tensor, initial: Tensor, reverse: bool, inner: bool) -> Tensor:
    starts = torch.full((plan.segments.shape[0], *ends.shape[1:]), float("nan"), dtype=torch.float64)
    for sequence, (first, count) in enumerate(plan.sequences.tolist()):
        state = initial[sequence].double()
        for segment in range(first, first + count)[:: -1 if reverse else 1]:
            starts[segment] = state
            own = segment - (sequence + reverse if inner else 0)
            if segment != (first if reverse else first + count - 1):
                state = state * decays[own].double().exp2()[:, None] + ends[own].double()
    return starts


@pytest.mark.parametrize("emulated", [False, pytest.param(True, marks=pytest.mark.skipif(CUDA, reason="on a CPU"))])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, [150, 0, 20, 200, 1, 128]], ids=str)
def test_many_segments(lengths: list[int] | None, reverse: bool, emulated: bool) -> None:
    from dualscan.ops.ssd.triton_combine import SEGMENTS_AT_ONCE, combine_kernel
    from tests import gluon

    cpu = torch.device("cpu")
    if lengths is None:
        plan = _triton.batch_plan(2, 4 * SEGMENTS_AT_ONCE * SEGMENT // 3, CHUNK, 1, SEGMENT, cpu)
    else:
        plan = _triton.packed_plan(packed(lengths), sum(lengths), CHUNK, 1, SEGMENT)
    assert plan.sequences[:, 1].max() > SEGMENTS_AT_ONCE
    inner, nseq = lengths is None, plan.sequences.shape[0]
    rows = (plan.after if reverse else plan.before).shape[0]
    ends, decays, initial = torch.randn(rows, HEADS, WIDTH), -torch.rand(rows, HEADS), torch.randn(nseq, HEADS, WIDTH)
    starts = torch.full((plan.segments.shape[0], HEADS, WIDTH), float("nan"))
    tensors = [t.to(DEVICE) for t in (ends, decays, initial, starts, plan.sequences)]
    grid, flags = (HEADS, 2, nseq), {"REVERSE": reverse, "INNER": inner, "HAS_INITIAL": True}
    arguments = (*tensors, HEADS, WIDTH)
    if emulated:
        gluon.run(combine_kernel, grid, arguments, BLOCK=64, **flags, AT_ONCE=SEGMENTS_AT_ONCE)
    else:
        combine_kernel[grid](*arguments, BLOCK=64, **flags, AT_ONCE=SEGMENTS_AT_ONCE)
    expected = recurrence(plan, ends, decays, initial, reverse, inner)
    used = torch.cat([torch.arange(first, first + count) for first, count in plan.sequences.tolist()])
    assert_close("starts", tensors[3].cpu()[used], expected[used], dtype=torch.float32)
