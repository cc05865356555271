"""The residual's sum and its norm in one: against float64 by hand, portably and by the kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dualscan.ops.norm import add_rms_norm, rms_norm
from dualscan.ops.norm.add_norm import add_rms_norm_bwd, add_rms_norm_fwd
from dualscan.ops.norm.reference import add_rms_norm_reference
from tests.ops.norm.test_values import EPS, LAYOUTS, by_hand
from tests.oracle import assert_close

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
# Dtypes of the residual stream, of y (None: nothing is added) and of the norm.
DTYPES = {
    "float64": (F64, F64, F64),
    "float32": (F32, F32, F32),
    "bfloat16 matrices": (F32, BF16, BF16),
    "float16 matrices": (F32, F16, F16),
    "y alone in float16": (F32, F16, F32),
    "a narrow stream": (F16, F16, F16),
    "nothing added": (F32, None, F16),
}
SHAPES = [(3, 4, 12), (12,), (5, 1), (2, 0, 12), (3, 2, 80), (5, 83), (30, 8)]
Results = dict[str, Tensor]


def problem(shape: tuple[int, ...], dtypes: tuple[Any, ...]) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """Inputs by argument name, and the cotangents of both results."""
    stream, y, normed = dtypes
    tensors = {
        "residual": torch.randn(shape).to(stream),
        "weight": torch.randn(shape[-1]).to(torch.promote_types(stream, F32)),
    }
    if y is not None:
        tensors["y"] = torch.randn(shape).to(y)
    return tensors, (torch.randn(shape).to(stream), torch.randn(shape).to(normed))


def evaluate(fn: Callable[..., Any], tensors: dict[str, Tensor], cotangents: tuple[Tensor, Tensor]) -> Results:
    """Both results and every gradient of their products with the cotangents."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    results = fn(**leaves)
    # Zero times each leaf: without rows the definition does not depend on anything.
    terms = [(r * c).sum() for r, c in zip(results, cotangents, strict=True)] + [(0 * t).sum() for t in leaves.values()]
    grads = torch.autograd.grad(torch.stack([term.double() for term in terms]).sum(), list(leaves.values()))
    made = {"sum": results[0].detach(), "normed": results[1].detach()}
    return made | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def exact(residual: Tensor, weight: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    total = residual if y is None else residual + y
    return total, by_hand(total, weight)


def portable(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda residual, weight, y=None: add_rms_norm(residual, y, weight, eps=EPS, dtype=dtype)


def kernels(dtype: torch.dtype) -> Callable[..., Any]:
    """What a GPU runs, without the dispatcher where there is none."""
    from dualscan.ops.norm import triton_add_norm

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, residual: Tensor, y: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
            out, normed = triton_add_norm.forward(residual, y, weight, EPS, dtype)
            ctx.save_for_backward(residual if y is None else out, weight)
            ctx.y = y
            return out, normed

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            (dout, dnormed), (x, weight) = grads, ctx.saved_tensors
            y_dtype = None if ctx.y is None else ctx.y.dtype
            dout = None if y_dtype is None else dout  # of no elements
            dresidual, dy, dweight = triton_add_norm.backward(dout, dnormed, x, weight, EPS, y_dtype)
            return dresidual, None if y_dtype is None else dy, dweight

    def run(residual: Tensor, weight: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, normed = Kernel.apply(residual, y, weight)
        return residual if y is None else out, normed

    return portable(dtype) if CUDA else run


def check(fn: Callable[..., Any], tensors: dict[str, Tensor], cotangents: tuple[Tensor, Tensor]) -> None:
    wide = {name: t.double() for name, t in tensors.items()}
    expected = evaluate(exact, wide, (cotangents[0].double(), cotangents[1].double()))
    narrowest = min((t.dtype for t in (*tensors.values(), *cotangents)), key=lambda d: torch.finfo(d).bits)
    for name, value in evaluate(fn, tensors, cotangents).items():
        stream = tensors["residual"].dtype
        own = {"sum": stream, "normed": cotangents[1].dtype}.get(
            name, tensors[name[1:]].dtype if name[0] == "d" else stream
        )
        assert value.dtype == own, name
        coarse = stream if name == "sum" else narrowest
        assert_close(name, value.cpu(), expected[name].cpu(), dtype=coarse, gradient=name[0] == "d")


def moved(tensors: dict[str, Tensor], cotangents: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
    return {name: t.to(DEVICE) for name, t in tensors.items()}, tuple(t.to(DEVICE) for t in cotangents)


@pytest.fixture(params=["small tiles", "whole"] if CUDA else ["small tiles"])
def triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    if not CUDA:
        request.getfixturevalue("interpreter")
    from dualscan.ops.norm import triton_norm

    triton_norm.tiles.cache_clear()
    if request.param == "small tiles":
        monkeypatch.setattr(triton_norm, "TILE", (1, 1))
        monkeypatch.setattr(triton_norm, "RESIDENT_WARPS", 2)
    yield
    triton_norm.tiles.cache_clear()


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_definition(shape: tuple[int, ...], dtypes: tuple[Any, ...]) -> None:
    check(portable(dtypes[2]), *problem(shape, dtypes))


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_the_reference_matches_the_definition(dtypes: tuple[Any, ...]) -> None:
    def run(residual: Tensor, weight: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return add_rms_norm_reference(residual, y, weight, EPS, dtypes[2])

    check(run, *problem((3, 4, 12), dtypes))


# The interpreter cannot multiply bfloat16, and float64 is not for the kernels.
KERNEL_DTYPES = [name for name in DTYPES if name != "float64" and (CUDA or name != "bfloat16 matrices")]


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtypes", [DTYPES[name] for name in KERNEL_DTYPES], ids=KERNEL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_match_the_definition(shape: tuple[int, ...], dtypes: tuple[Any, ...]) -> None:
    tensors, cotangents = problem(shape, dtypes)
    check(kernels(dtypes[2]), *moved(tensors, cotangents))


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("width", [768, 2560, 5000])
def test_widths_of_models(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from dualscan.ops.norm import triton_norm

    monkeypatch.setattr(triton_norm, "TILE", (2048, 1024))
    triton_norm.tiles.cache_clear()
    check(kernels(F16), *moved(*problem((3, width), (F32, F16, F16))))


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_do_not_matter(layout: Callable[[Tensor], Tensor]) -> None:
    tensors, cotangents = moved(*problem((3, 4, 16), (F32, F16, F16)))
    strided = {name: layout(t) if t.ndim == 3 else t for name, t in tensors.items()}
    for make in (kernels, portable):
        expected = evaluate(make(F16), tensors, cotangents)
        for name, value in evaluate(make(F16), strided, tuple(map(layout, cotangents))).items():
            assert torch.equal(value, expected[name]), name
        assert make(F16)(**strided)[0].is_contiguous()


@pytest.mark.usefixtures("triton")
def test_normalising_the_sum_again_gives_the_same_bits() -> None:
    """What a recipe of the norm, kept in its place, relies on; and the sum is the plain sum."""
    tensors, _ = moved(*problem((7, 200), (F32, F16, F16)))
    for run in (kernels(F16), portable(F16)):
        total, normed = run(**tensors)
        assert torch.equal(total, tensors["residual"] + tensors["y"])
        assert torch.equal(run(residual=total, weight=tensors["weight"])[1], normed)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 20), cut=st.integers(0, 20), d=st.sampled_from([1, 6, 33, 96]))
def test_a_row_does_not_depend_on_its_neighbours(rows: int, cut: int, d: int) -> None:
    tensors, cotangents = problem((rows, d), DTYPES["bfloat16 matrices"])
    whole, cut = evaluate(portable(BF16), tensors, cotangents), min(cut, rows)
    for part in (slice(0, cut), slice(cut, rows)):
        few = {name: t[part] if t.ndim == 2 else t for name, t in tensors.items()}
        some = evaluate(portable(BF16), few, (cotangents[0][part], cotangents[1][part]))
        for name in some.keys() - {"dweight"}:
            assert torch.equal(some[name], whole[name][part]), name


@pytest.mark.parametrize("used", ["sum", "normed"])
@pytest.mark.parametrize("y_dtype", [F64, F32], ids=str)
def test_one_of_the_results_is_enough(used: str, y_dtype: torch.dtype) -> None:
    residual, y = torch.randn(3, 8, dtype=F64, requires_grad=True), torch.randn(3, 8, dtype=y_dtype, requires_grad=True)
    weight, cotangent = torch.randn(8, dtype=F64, requires_grad=True), torch.randn(3, 8, dtype=F64)
    result = add_rms_norm(residual, y, weight)[used == "normed"]
    grads = torch.autograd.grad((result * cotangent).sum(), (residual, y, weight), allow_unused=True)
    if used == "sum":
        assert torch.equal(grads[0], cotangent)
        assert torch.equal(grads[1], cotangent.to(y_dtype))
        assert grads[2] is None
        return
    plain = rms_norm(residual + y, weight)
    for actual, expected in zip(
        grads, torch.autograd.grad((plain * cotangent).sum(), (residual, y, weight)), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtypes", [(F32, BF16, BF16), (F32, F32, F32), (F32, None, BF16)], ids=str)
def test_opcheck(dtypes: tuple[Any, ...]) -> None:
    tensors, (dout, dnormed) = problem((2, 3, 8), dtypes)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    inputs = leaves["residual"], leaves.get("y"), leaves["weight"], 1e-5, dtypes[2]
    assert set(torch.library.opcheck(add_rms_norm_fwd, inputs).values()) == {"SUCCESS"}
    out, weight = inputs[0].detach(), inputs[2].detach()
    y_dtype = dtypes[1] if dtypes[1] is not F32 else None
    for above in (dout, None):
        results = torch.library.opcheck(add_rms_norm_bwd, (above, dnormed, out, weight, 1e-5, y_dtype))
        assert set(results.values()) == {"SUCCESS"}


def test_gradcheck() -> None:
    tensors, _ = problem((2, 3, 8), DTYPES["float64"])
    leaves = [tensors[name].requires_grad_() for name in ("residual", "y", "weight")]
    assert torch.autograd.gradcheck(lambda h, y, w: tuple(add_rms_norm(h, y, w)), leaves)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic: bool) -> None:
    def step(residual: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        h, normed = add_rms_norm(residual, y, weight, dtype=BF16)
        h, normed = add_rms_norm(h, normed.sin(), weight)
        return h.sum() + normed.cos().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for seqlen in (3, 5):
        leaves = [torch.randn(s, requires_grad=True) for s in ((2, seqlen, 8), (2, seqlen, 8), (8,))]
        actual, expected = compiled(*leaves), step(*leaves)
        torch.testing.assert_close(actual, expected)
        grads = (torch.autograd.grad(value, leaves) for value in (actual, expected))
        for a, e in zip(*grads, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize(("added", "forward", "backward"), [(True, 5, 12), (False, 4, 11)])
def test_flops(added: bool, forward: int, backward: int) -> None:
    residual, y, weight = torch.randn(2, 8, requires_grad=True), torch.randn(2, 8) if added else None, torch.ones(8)
    with FlopCounterMode(display=False) as counter:
        h, normed = add_rms_norm(residual, y, weight)
    assert counter.get_total_flops() == forward * 16
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(h.sum() + normed.sum(), residual)
    assert counter.get_total_flops() == backward * 16


REFUSED: dict[str, tuple[type[Exception], dict[str, Any], list[str]]] = {
    "rank": (ValueError, {"residual": torch.tensor(1.0)}, ["residual", "no dimension", "(..., d)"]),
    "y": (ValueError, {"y": torch.ones(2, 5)}, ["y has shape (2, 5)", "that of residual, (2, 6)"]),
    "dtype of y": (TypeError, {"y": torch.ones(2, 6, dtype=torch.int64)}, ["y has dtype", "int64"]),
    "device of y": (ValueError, {"y": torch.ones(2, 6, device="meta")}, ["y is on meta", "residual on cpu"]),
    "weight": (ValueError, {"weight": torch.ones(5)}, ["(5,)", "d=6", "last dimension of residual"]),
    "eps": (ValueError, {"eps": -1.0}, ["eps=-1.0", "1e-5"]),
    "dtype": (TypeError, {"dtype": torch.int32}, ["dtype=torch.int32", "torch.bfloat16"]),
}


@pytest.mark.parametrize(("error", "wrong", "words"), REFUSED.values(), ids=REFUSED)
def test_refuses(error: type[Exception], wrong: dict[str, Any], words: list[str]) -> None:
    given = {"residual": torch.randn(2, 6), "y": torch.randn(2, 6), "weight": torch.ones(6), **wrong}
    with pytest.raises(error) as raised:
        add_rms_norm(given.pop("residual"), given.pop("y"), given.pop("weight"), **given)
    assert "add_rms_norm" in str(raised.value)
    assert [word for word in words if word not in str(raised.value)] == []


@pytest.mark.cuda
def test_graph_capture() -> None:
    tensors, cotangents = moved(*problem((40, 64), DTYPES["bfloat16 matrices"]))
    expected = evaluate(portable(BF16), tensors, cotangents)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        captured = evaluate(portable(BF16), tensors, cotangents)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)
