"""The kernel against PyTorch in float64: in Triton's interpreter, on a GPU as it is."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dualscan.ops.loss import chunked, linear_cross_entropy
from tests.ops.loss.problem import CORNERS, compare, evaluate, problem
from tests.oracle import assert_close

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [] if CUDA else [pytest.mark.usefixtures("interpreter")]
# The interpreter is slow: there float16 takes the corners that reach every branch.
FEW = ["plain", "everything, none"]
RUNS = [(name, torch.float32) for name in CORNERS]
RUNS += [(name, dtype) for dtype in (torch.float16, torch.bfloat16)[: 1 + CUDA] for name in (CORNERS if CUDA else FEW)]


@pytest.fixture(params=["small", "whole"], autouse=True)
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from dualscan.ops.loss import triton_softmax

    if request.param == "small":
        monkeypatch.setattr(triton_softmax, "BLOCK", 16)
        monkeypatch.setattr(triton_softmax, "SCALE_BLOCK", 32)
        for name, tokens in (("SLICE_LOW", 4), ("SLICE", 10), ("SLICE_FORWARD", 6)):
            monkeypatch.setattr(chunked, name, (tokens, 0))


@pytest.mark.parametrize(("corner", "dtype"), RUNS, ids=str)
def test_matches_pytorch(corner: str, dtype: torch.dtype):
    tensors, target, options = problem(**CORNERS[corner], dtype=dtype)
    if dtype != torch.float32:  # lower precisions round the logits, or their gradient
        tensors["x"] *= 0.2
    compare(tensors, target, options, device=DEVICE, impl="triton")


def test_a_bias_of_minus_infinity():
    """Whole blocks of logits, the first among them, may be left out."""
    tensors, target, options = problem(vocab=64, bias=True, dtype=torch.float32)
    tensors["bias"][:20] = tensors["bias"][40:] = float("-inf")
    target = target.remainder(20) + 20
    compare(tensors, target, options, device=DEVICE, impl="triton")


@pytest.mark.parametrize("corner", ["plain", "sum", "everything", "everything, none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weights(corner: str, dtype: torch.dtype):
    """As autocast has them; no more digits than before, since the products are in 16 bits."""
    tensors, target, options = problem(**CORNERS[corner], dtype=dtype)
    tensors["weight"] = tensors["weight"].float()
    tensors["x"] *= 0.2
    compare(tensors, target, options, device=DEVICE, impl="triton")


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow_interpreted)], ids=str
)
def test_many_slices(dtype: torch.dtype):
    """More tokens than a slice holds, of which one slice counts none; memory with gaps."""
    tensors, target, options = problem(shape=(2, 70), vocab=64, dtype=dtype)
    target[0, 20:40] = -100
    tensors["x"] *= 0.2
    compare(tensors, target, options, device=DEVICE, impl="triton")
    gaps = {name: t.to(DEVICE).repeat_interleave(2, dim=-1)[..., ::2] for name, t in tensors.items()}
    spread = target.to(DEVICE).repeat_interleave(2, dim=-1)[..., ::2]
    found = evaluate(linear_cross_entropy, gaps, spread, {"impl": "triton"})
    straight = {name: t.to(DEVICE) for name, t in tensors.items()}
    expected = evaluate(linear_cross_entropy, straight, target.to(DEVICE), {"impl": "triton"})
    for name, value in found.items():
        assert_close(name, value, expected[name].double(), dtype=dtype, gradient=name != "loss")


def test_nothing_counts():
    tensors, target, _ = problem(dtype=torch.float32)
    target.fill_(-100)
    tensors, target = {name: t.to(DEVICE) for name, t in tensors.items()}, target.to(DEVICE)
    found = evaluate(linear_cross_entropy, tensors, target, {"impl": "triton"})
    assert found["loss"].isnan()
    assert not found["dx"].any()
    assert not found["dweight"].any()
    assert evaluate(linear_cross_entropy, tensors, target, {"impl": "triton", "reduction": "sum"})["loss"] == 0


@pytest.mark.parametrize("count", [1, 24, 1000])
@pytest.mark.parametrize("factor", [1.0, 0.5, float("nan")])
def test_scale(count: int, factor: float):
    from dualscan.ops.loss import triton_softmax

    t = torch.randn(count, device=DEVICE)
    expected = t * factor
    triton_softmax.scale_(t, torch.tensor(factor, device=DEVICE))
    assert torch.equal(t.nan_to_num(7), expected.nan_to_num(7))


def test_large_logits():
    tensors, target, options = problem(dtype=torch.float32)
    compare({**tensors, "weight": 1e3 * tensors["weight"]}, target, options, device=DEVICE, impl="triton")


def test_repeats_bitwise():
    tensors, target, _ = problem(dtype=torch.float32)
    tensors, target = {name: t.to(DEVICE) for name, t in tensors.items()}, target.to(DEVICE)
    first, second = (evaluate(linear_cross_entropy, tensors, target, {"impl": "triton"}) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_the_kernel_cannot_compute():
    x, weight = torch.zeros(2, 3, dtype=torch.float64, device=DEVICE), torch.zeros(3, 3, device=DEVICE)
    with pytest.raises(ValueError, match=r"linear_cross_entropy: impl='triton' .* not torch.float64; use impl='auto'"):
        linear_cross_entropy(x, weight, torch.zeros(2, device=DEVICE).long(), impl="triton")


def test_the_kernel_needs_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"impl='triton' cannot run on cpu: .* NVIDIA GPU; use impl='auto'"):
        linear_cross_entropy(torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(2).long(), impl="triton")


@pytest.mark.cuda
def test_a_wrong_target_is_not_a_number():
    x, weight = torch.randn(3, 16, device="cuda"), torch.randn(32, 16, device="cuda")
    loss = linear_cross_entropy(x, weight, torch.tensor([3, 32, -1], device="cuda"), reduction="none")
    assert loss.isnan().tolist() == [False, True, True]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("impl", ["triton", "chunked"])
def test_a_vocabulary_of_a_model(impl: Any, dtype: torch.dtype):
    tensors, target, options = problem(shape=(2, 700), d=256, vocab=50288, z_loss=1e-3, dtype=dtype)
    tensors["weight"] *= 0.05
    compare(tensors, target, options, device="cuda", impl=impl)


@pytest.mark.cuda
def test_a_large_sum_survives_float16():
    """Before it is divided by the tokens, the gradient of a weight is above float16's largest number."""
    tensors, target, options = problem(shape=(4096,), d=8, vocab=512, dtype=torch.float16)
    tensors["x"] = tensors["x"].abs() + 30
    tensors["weight"] *= 0.1
    compare(tensors, target.zero_(), options, device="cuda", impl="triton")


@pytest.mark.cuda
def test_bfloat16_sums_need_no_second_copy():
    """The peak is the results and one slice of logits."""
    tensors, target, _ = problem(shape=(4096,), d=256, vocab=50288, dtype=torch.bfloat16)
    leaves = {name: t.cuda().requires_grad_() for name, t in tensors.items()}
    target = target.cuda()

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(linear_cross_entropy(**leaves, target=target), list(leaves.values()))

    run()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    results = sum(t.numel() for t in leaves.values()) + 1024 * 50288
    assert torch.cuda.max_memory_allocated() - before <= 2 * results + 2**16


@pytest.mark.cuda
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
def test_graph_capture(weights: torch.dtype):
    tensors, target, _ = problem(shape=(64,), d=64, vocab=512, dtype=torch.bfloat16)
    tensors["weight"] = tensors["weight"].to(weights)
    tensors, target = {name: t.cuda() for name, t in tensors.items()}, target.cuda()
    expected = evaluate(linear_cross_entropy, tensors, target, {})
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        captured = evaluate(linear_cross_entropy, tensors, target, {})
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)
