"""The kernels against the float64 brute force: in Triton's interpreter, on a GPU as they are."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dualscan.ops.conv1d import causal_conv1d
from dualscan.ops.conv1d.library import causal_conv1d_kernel_bwd, causal_conv1d_kernel_fwd
from tests.ops.conv1d.problem import Problem, brute_force, evaluate, problem
from tests.ops.conv1d.test_values import CORNERS
from tests.oracle import assert_close

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [] if CUDA else [pytest.mark.usefixtures("interpreter")]
# The interpreter is slow: there float16 takes the corners that reach every branch, and whole tiles one test.
FEW = ["everything", "packed", "one token"]
RUNS = [(name, torch.float32) for name in CORNERS]
RUNS += [(name, dtype) for dtype in (torch.float16, torch.bfloat16)[: 1 + CUDA] for name in (CORNERS if CUDA else FEW)]


@pytest.fixture(params=["cut", "whole"] if CUDA else ["cut"], autouse=True)
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of a few tokens and blocks of a few channels, so that small inputs have edges inside; or none."""
    pytest.importorskip("triton")
    from dualscan.ops.conv1d import triton_conv1d

    if request.param == "cut":
        monkeypatch.setattr(triton_conv1d, "SHORTEST_SEGMENT", 4)
        monkeypatch.setattr(triton_conv1d, "OCCUPANCY", (1000, 1000))
        monkeypatch.setattr(triton_conv1d, "TILES", ((8, 1, 4), (8, 1, 2)))
        monkeypatch.setattr(triton_conv1d, "STEP_BLOCK", 4)


def on_device(p: Problem) -> Problem:
    return replace(p.map(lambda t: t.to(DEVICE)), cu_seqlens=None if p.cu_seqlens is None else p.cu_seqlens.to(DEVICE))


def compare(p: Problem) -> None:
    """Values and gradients against the float64 brute force, in the dtypes of their tensors."""
    dtype = p.tensors["x"].dtype
    expected = evaluate(brute_force, p.map(Tensor.double))
    for name, value in evaluate(lambda q: q(impl="triton"), on_device(p)).items():
        original = p.tensors.get(name[1:])
        assert value.dtype == (dtype if original is None else original.dtype), name
        assert_close(name, value.cpu(), expected[name], dtype=dtype, gradient=name.startswith("d"))


@pytest.mark.parametrize(("corner", "dtype"), RUNS, ids=str)
def test_matches_brute_force(corner: str, dtype: torch.dtype):
    compare(problem(**CORNERS[corner], dtype=dtype))


@pytest.mark.parametrize("cut", ["whole"], indirect=True)
@pytest.mark.parametrize("lengths", [None, [70, 1, 0, 90]], ids=["batch", "packed"])
def test_tiles_as_they_are(lengths: list[int] | None):
    compare(problem(seqlen=70, channels=300, lengths=lengths, dtype=torch.float32))


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize(
    "lengths", [pytest.param(None, marks=pytest.mark.slow_interpreted), [6, 1, 4]], ids=["batch", "packed"]
)
def test_every_width(width: int, lengths: list[int] | None):
    compare(problem(width=width, lengths=lengths, dtype=torch.float32))


@pytest.mark.parametrize("lengths", [None, [1] * 5 + [9, 0, 4]], ids=["batch", "packed"])
@pytest.mark.parametrize("channels", [8, 24])
def test_aligned_rows(channels: int, lengths: list[int] | None):
    """Multiples of eight channels take the wide loads."""
    mixed = problem(channels=channels, seqlen=14, lengths=lengths, dtype=torch.float16)
    for name in ("weight", "bias"):
        mixed.tensors[name] = mixed.tensors[name].float()
    compare(mixed)


def _column_slice(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:2], t.shape[2] + 7), float("nan"), dtype=t.dtype, device=t.device)
    wide[..., 3:-4] = t
    return wide[..., 3:-4]


LAYOUTS = {
    "a column slice": _column_slice,
    "channels first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "batch inside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every other token": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "broadcast": lambda t: t[:1, :1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("seqlen", [pytest.param(1, marks=pytest.mark.slow_interpreted), 9])
def test_strides_do_not_matter(layout: Any, seqlen: int):
    p = on_device(problem(seqlen=seqlen, channels=16, dtype=torch.float32))
    p.tensors["x"] = layout(p.tensors["x"])
    p.tensors["weight"] = p.tensors["weight"].t().contiguous().t()
    p = replace(p, dy=layout(p.dy), dfinal=layout(p.dfinal))
    straight = evaluate(lambda q: q(impl="triton"), p.map(torch.clone).map(Tensor.contiguous))
    for name, value in evaluate(lambda q: q(impl="triton"), p).items():
        # Compiled for other strides, sums may round differently.
        assert_close(name, value, straight[name].double(), dtype=torch.float32, gradient=name.startswith("d"))


def test_vectors_with_gaps():
    p = on_device(problem(lengths=[4, 1, 0, 2], dtype=torch.float32))
    expected = evaluate(lambda q: q(impl="triton"), p)
    assert p.cu_seqlens is not None
    p.tensors["bias"] = p.tensors["bias"].repeat_interleave(2)[::2]
    gaps = replace(p, cu_seqlens=p.cu_seqlens.repeat_interleave(2)[::2])
    for name, value in evaluate(lambda q: q(impl="triton"), gaps).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("seqlen", [1, 10])
def test_an_unaligned_pointer(seqlen: int):
    p = on_device(problem(seqlen=seqlen, channels=16, dtype=torch.float32))
    expected = evaluate(lambda q: q(impl="triton"), p)
    memory = torch.empty(p.tensors["x"].numel() + 1, device=DEVICE)
    p.tensors["x"] = memory[1:].view(p.tensors["x"].shape).copy_(p.tensors["x"])
    for name, value in evaluate(lambda q: q(impl="triton"), p).items():
        assert torch.equal(value, expected[name]), name


def test_packed_is_each_sequence_alone_bitwise():
    lengths, start = [4, 1, 0, 2, 9, 3], 0
    together = on_device(problem(lengths=lengths, dtype=torch.float32))
    actual = evaluate(lambda q: q(impl="triton"), together)
    for i, length in enumerate(lengths):
        own = {name: t for name, t in together.tensors.items() if name in ("weight", "bias")}
        own |= {"x": together.tensors["x"][:, start : start + length]}
        own |= {"initial_states": together.tensors["initial_states"][i : i + 1]}
        alone = Problem(own, together.dy[:, start : start + length], together.dfinal[i : i + 1])
        expected = evaluate(lambda q: q(impl="triton"), alone)
        for name in ("y", "dx"):
            assert torch.equal(actual[name][:, start : start + length], expected[name]), name
        for name in ("final_states", "dinitial_states"):
            assert torch.equal(actual[name][i : i + 1], expected[name]), name
        start += length


def test_repeats_bitwise():
    p = on_device(problem(lengths=[6, 1, 9], channels=12, dtype=torch.float16))
    first, second = (evaluate(lambda q: q(impl="triton"), p) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("lengths", [None, [4, 1, 0, 2]], ids=["batch", "packed"])
def test_opcheck(lengths: list[int] | None):
    p = on_device(problem(seqlen=4, channels=3, lengths=lengths, dtype=torch.float32))
    leaves = [p.tensors[name].requires_grad_() for name in ("x", "weight", "bias", "initial_states")]
    arguments = (*leaves, p.cu_seqlens, True)
    assert set(torch.library.opcheck(causal_conv1d_kernel_fwd, arguments).values()) == {"SUCCESS"}
    detached = tuple(t.detach() if isinstance(t, Tensor) else t for t in arguments)
    results = torch.library.opcheck(causal_conv1d_kernel_bwd, (p.dy, p.dfinal, *detached))
    assert set(results.values()) == {"SUCCESS"}


def test_what_the_kernels_cannot_compute():
    x, weight = torch.zeros(1, 2, 3, dtype=torch.float64, device=DEVICE), torch.zeros(3, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"causal_conv1d: impl='triton' .* not torch.float64; use impl='auto'"):
        causal_conv1d(x, weight, impl="triton")


def test_kernels_need_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run on cpu: .* NVIDIA GPU; use impl='auto'"):
        causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(3, 4), impl="triton")


@pytest.mark.cuda
@pytest.mark.parametrize("lengths", [None, [4, 1, 0, 2, 9]], ids=["batch", "packed"])
def test_graph_capture(lengths: list[int] | None):
    p = on_device(problem(seqlen=16, lengths=lengths, channels=64, dtype=torch.bfloat16))
    expected = evaluate(lambda q: q(), p)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        captured = evaluate(lambda q: q(), p)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


@pytest.mark.cuda
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(dynamic: bool):
    torch._dynamo.reset()
    compiled = torch.compile(causal_conv1d, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlen in (7, 1, 9):
        p = on_device(problem(seqlen=seqlen, channels=64, dtype=torch.bfloat16))
        expected = evaluate(lambda q: q(), p)
        actual = evaluate(lambda q: compiled(**q.tensors, activation="silu"), p)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.cuda
def test_more_than_two_to_the_31_elements():
    channels, seqlen = 5376, 420_000
    x = torch.randn(1, seqlen, channels, device="cuda", dtype=torch.bfloat16).requires_grad_()
    assert x.numel() > 2**31
    weight = torch.randn(channels, 4, device="cuda", dtype=torch.bfloat16)
    y = causal_conv1d(x, weight, impl="triton").y
    (dx,) = torch.autograd.grad(y, x, torch.ones(1, 1, 1, device="cuda", dtype=y.dtype).expand(y.shape))
    last = causal_conv1d(x[:, -100:], weight, impl="triton").y
    assert torch.equal(y[:, -50:], last[:, -50:])
    taps = weight.double()
    expected = torch.stack([taps[:, 3], taps[:, 2:].sum(1), taps[:, 1:].sum(1), taps.sum(1)])
    assert_close("dx", dx[0, -4:].flip(0), expected, dtype=torch.bfloat16, gradient=True)
