"""The kernels against the definition in float64: in Triton's interpreter, on a GPU as they are."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dualscan.ops.norm import gated_rms_norm, library, rms_norm
from tests.ops.norm.test_values import CORNERS, EPS, LAYOUTS, by_hand, evaluate, problem
from tests.oracle import assert_close

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [] if CUDA else [pytest.mark.usefixtures("interpreter")]
# The interpreter is slow: there float16 takes the corners that reach every branch.
FEW = ["groups", "groups, gated after", "odd chunks"]
# Beside the corners: several chunks of which the last is cut, several blocks of rows, aligned and odd widths.
SIZES: dict[str, dict[str, Any]] = {
    "chunks": {"shape": (3, 2, 80), "gate": True},
    "chunks, gated after": {"shape": (3, 2, 80), "gate": True, "norm_before_gate": True},
    "odd chunks": {"shape": (5, 83)},
    "groups of chunks": {"shape": (3, 160), "gate": True, "group": 80},
    "many rows": {"shape": (30, 8), "gate": True, "group": 4},
}
ALL = CORNERS | SIZES
RUNS = [(name, torch.float32) for name in ALL]
RUNS += [(name, dtype) for dtype in (torch.float16, torch.bfloat16)[: 1 + CUDA] for name in (ALL if CUDA else FEW)]


@pytest.fixture(params=["small tiles", "whole"] if CUDA else ["small tiles"], autouse=True)
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("triton")
    from dualscan.ops.norm import triton_norm

    triton_norm.tiles.cache_clear()
    if request.param == "small tiles":
        monkeypatch.setattr(triton_norm, "TILE", (1, 1))
        monkeypatch.setattr(triton_norm, "RESIDENT_WARPS", 2)
    yield
    triton_norm.tiles.cache_clear()


@pytest.fixture(autouse=not CUDA)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the operators take the CPU's form: here they are stood in for by what they call on a GPU."""
    pytest.importorskip("triton")
    from dualscan.ops.norm import triton_norm

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            ctx.save_for_backward(*inputs[:3])
            ctx.options = inputs[3:]
            return triton_norm.forward(*inputs)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            x, z, weight = ctx.saved_tensors
            dx, dz, dweight = triton_norm.backward(grads[0], x, z, weight, *ctx.options)
            return dx, None if z is None else dz, dweight, None, None, None

    monkeypatch.setattr("dualscan.ops.norm.rms_norm_fwd", Kernel.apply)


def run(tensors: dict[str, Tensor], group: int = 0, norm_before_gate: bool = False) -> Tensor:
    tensors = {name: t.to(DEVICE) for name, t in tensors.items()}
    if "z" not in tensors:
        return rms_norm(**tensors, eps=EPS)
    return gated_rms_norm(**tensors, group_size=group or None, norm_before_gate=norm_before_gate, eps=EPS)


def compare(tensors: dict[str, Tensor], dy: Tensor, **options: Any) -> None:
    exact = {name: t.double() for name, t in tensors.items()}
    expected = evaluate(lambda t, **o: by_hand(**t, **o), exact, dy.double(), **options)
    there = {name: t.to(DEVICE) for name, t in tensors.items()}
    for name, value in evaluate(run, there, dy.to(DEVICE), **options).items():
        assert value.dtype == (tensors[name[1:]].dtype if name != "y" else tensors["x"].dtype), name
        assert_close(name, value.cpu(), expected[name], dtype=tensors["x"].dtype, gradient=name != "y")


@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=str)
def test_matches_the_definition(name: str, dtype: torch.dtype):
    corner = ALL[name]
    sizes = {name: corner[name] for name in ("shape", "gate") if name in corner}
    options = {name: corner[name] for name in ("group", "norm_before_gate") if name in corner}
    compare(*problem(**sizes, dtype=dtype), **options)


@pytest.mark.parametrize("d", [768, 1536, 2560, 5120, 5000])
def test_widths_of_models(d: int, monkeypatch: pytest.MonkeyPatch):
    from dualscan.ops.norm import triton_norm

    monkeypatch.setattr(triton_norm, "TILE", (2048, 1024))
    triton_norm.tiles.cache_clear()
    tensors, dy = problem((2, d), gate=True, dtype=torch.float16)
    tensors["weight"] = tensors["weight"].float()
    compare(tensors, dy)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("group", [0, 8])
def test_strides_do_not_matter(layout: Any, group: int):
    tensors, dy = problem((3, 4, 16), gate=True, dtype=torch.float32)
    tensors, dy = {name: t.to(DEVICE) for name, t in tensors.items()}, dy.to(DEVICE)
    expected = evaluate(run, tensors, dy, group=group)
    strided = {name: layout(t) if t.ndim == 3 else t for name, t in tensors.items()}
    for name, value in evaluate(run, strided, layout(dy), group=group).items():
        assert torch.equal(value, expected[name]), name
    assert torch.equal(evaluate(run, tensors, dy[:1, :1].expand(dy.shape), group=group)["y"], expected["y"])


def test_a_row_does_not_depend_on_its_neighbours():
    tensors, dy = problem((11, 96), gate=True, dtype=torch.float16)
    tensors, dy = {name: t.to(DEVICE) for name, t in tensors.items()}, dy.to(DEVICE)
    whole = evaluate(run, tensors, dy)
    for part in (slice(0, 4), slice(4, 11)):
        some = evaluate(run, {name: t[part] if t.ndim == 2 else t for name, t in tensors.items()}, dy[part])
        for name in some.keys() - {"dweight"}:
            assert torch.equal(some[name], whole[name][part]), name


def test_repeats_bitwise():
    tensors, dy = problem((40, 24), gate=True, dtype=torch.float16)
    tensors, dy = {name: t.to(DEVICE) for name, t in tensors.items()}, dy.to(DEVICE)
    first, second = (evaluate(run, tensors, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_the_kernels_cannot_compute():
    cuda = torch.device("cuda") if CUDA else torch.device("cpu")
    reason = library.obstacle(cuda, 20000, torch.float32, torch.float32, torch.float32)
    assert "groups of 20000 channels" in str(reason) if CUDA else "NVIDIA GPU" in str(reason)
    assert library.obstacle(cuda, 8, torch.float64, torch.float32, torch.float32) is not None


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:rms_norm runs its portable PyTorch form")
def test_float64_takes_the_portable_form():
    tensors, dy = problem(gate=True)
    compare(tensors, dy)


@pytest.mark.cuda
def test_graph_capture():
    tensors, dy = problem((40, 64), gate=True, dtype=torch.bfloat16)
    tensors, dy = {name: t.cuda() for name, t in tensors.items()}, dy.cuda()
    expected = evaluate(run, tensors, dy)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        captured = evaluate(run, tensors, dy)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


@pytest.mark.cuda
def test_more_than_two_to_the_31_elements():
    x = torch.randn(420_000, 5376, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(5376, device="cuda")
    y = rms_norm(x, weight)
    (dx,) = torch.autograd.grad(y, x, y.detach()[:1].expand(y.shape))
    tail = x.detach()[-100:].clone().requires_grad_()
    last = rms_norm(tail, weight)
    assert torch.equal(last, y[-100:])
    assert torch.equal(torch.autograd.grad(last, tail, y.detach()[:1].expand(last.shape))[0], dx[-100:])
