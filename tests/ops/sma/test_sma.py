"""Structured masked attention equals its definition in every order, for every mask and head pattern, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dualscan.ops.sma as module
from dualscan.ops.sma import features, masks, sma
from dualscan.ops.sma.heads import PATTERNS, head_counts
from dualscan.ops.sma.neighbours import retention
from dualscan.ops.ssd import linear_attention, ssd
from dualscan.semiseparable import (
    Cosine,
    Diagonal,
    Fourier,
    LowRank,
    OneSemiseparable,
    SemiseparableMatrix,
    StructuredMatrix,
    Toeplitz,
    Vandermonde,
)
from tests.oracle import assert_close

quick = settings(max_examples=30, deadline=None, derandomize=True)

HEADS, BATCH = 4, 2


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


class Window(StructuredMatrix):
    """Ones on a band below the diagonal: what a user would write."""

    is_causal = True

    def __init__(self, length: int, width: int):
        self.length, self.width, self.tensor = length, width, torch.zeros((), dtype=torch.float64)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.length, self.length))

    def matmul(self, x: Tensor) -> Tensor:
        sums = torch.nn.functional.pad(x.cumsum(-2), (0, 0, self.width, 0))
        return sums[..., self.width :, :] - sums[..., : -self.width, :]

    def to_dense(self) -> Tensor:
        return torch.ones(self.length, self.length, dtype=torch.float64).tril().triu(1 - self.width)


# What each needs: the length, and the leading dimensions that a mask may have.
MASKS: dict[str, Callable[[int, tuple[int, ...]], StructuredMatrix]] = {
    "causal": lambda n, _: masks.causal(n, dtype=torch.float64),
    "decay": lambda n, _: masks.decay(-uniform(HEADS), n),
    "selective": lambda n, _: masks.selective(-3 * uniform(BATCH, n, HEADS)),
    "1-SS of any sign": lambda n, lead: OneSemiseparable(2 * uniform(*lead, n) - 1),
    "growing 1-SS": lambda n, lead: OneSemiseparable(1 + uniform(*lead, n) / 10),
    "1-SS that forgets": lambda n, lead: OneSemiseparable((uniform(*lead, n) > 0.5).double()),
    "causal Toeplitz": lambda n, lead: Toeplitz(normal(*lead, n)),
    "Toeplitz": lambda n, lead: Toeplitz(normal(*lead, n), normal(*lead, n)),
    "Fourier": lambda n, _: Fourier(n, torch.complex128),
    "cosine": lambda n, _: Cosine(n, torch.float64),
    "low rank": lambda n, lead: LowRank(normal(*lead, n, 2), normal(*lead, n, 2)),
    "semiseparable": lambda n, lead: SemiseparableMatrix.random(n, 3, batch=lead, kind="diagonal", dtype=torch.float64),
    "diagonal": lambda n, lead: Diagonal(normal(*lead, n)),
    "sum": lambda n, lead: Toeplitz(normal(*lead, n)) + LowRank(normal(n, 1), normal(n, 1)),
    "transposed": lambda n, lead: OneSemiseparable(uniform(*lead, n)).mT,
    "of a user": lambda n, _: Window(n, 3),
    "Vandermonde": lambda n, _: Vandermonde(uniform(n), n),
}
names = st.sampled_from(sorted(MASKS))
leads = st.sampled_from([(), (HEADS,), (1, HEADS), (BATCH, HEADS), (BATCH, 1)])
patterns = st.sampled_from(sorted(PATTERNS))


def inputs(length: int, pattern: str) -> list[Tensor]:
    counts = head_counts(pattern, HEADS, 2 if pattern == "grouped-value" else 1)
    widths = (5, 5, 3)
    return [normal(BATCH, length, count, width) for count, width in zip(counts, widths, strict=True)]


def defined(q: Tensor, k: Tensor, v: Tensor, dense: Tensor) -> Tensor:
    """Σ_s L_ts (q_t · k_s) v_s, entry by entry of the definition."""
    nheads = max(q.shape[2], k.shape[2], v.shape[2], dense.shape[-3] if dense.ndim > 2 else 1)
    q, k, v = (t.repeat_interleave(nheads // t.shape[2], dim=2).to(dense.dtype) for t in (q, k, v))
    dense = dense.expand(q.shape[0], nheads, *dense.shape[-2:])
    return torch.einsum("bhts,bthn,bshn,bshp->bthp", dense, q, k, v)


@quick
@given(names, leads, patterns, st.integers(1, 30))
def test_orders_equal_the_definition(name: str, lead: tuple[int, ...], pattern: str, length: int) -> None:
    mask, (q, k, v) = MASKS[name](length, lead), inputs(length, pattern)
    expected = defined(q, k, v, mask.to_dense())
    for impl in ("linear", "quadratic", "auto"):
        assert_close(impl, torch.view_as_real(sma(q, k, v, mask, impl=impl) + 0j), torch.view_as_real(expected + 0j),
                     dtype=torch.float64)  # fmt: skip


@quick
@given(st.sampled_from(["causal", "decay", "selective", "1-SS of any sign"]), leads, patterns, st.integers(1, 30))
def test_the_operator_of_ssd_equals_the_definition(name: str, lead: tuple[int, ...], pattern: str, length: int) -> None:
    mask, (q, k, v) = MASKS[name](length, lead), inputs(length, pattern)
    assert_close("ssd", sma(q, k, v, mask, impl="ssd"), defined(q, k, v, mask.to_dense()), dtype=torch.float64)


@pytest.mark.parametrize("impl", ["ssd", "linear", "quadratic"])
@pytest.mark.parametrize("kind", ["log decay", "factors"])
def test_gradients_equal_those_of_the_definition(impl: str, kind: str) -> None:
    decays = (-uniform(BATCH, 12, HEADS) if kind == "log decay" else 2 * uniform(BATCH, HEADS, 12) - 1).requires_grad_()
    q, k, v = (t.requires_grad_() for t in inputs(12, "grouped-value"))
    leaves = [q, k, v, decays]
    mask = masks.selective(decays) if kind == "log decay" else OneSemiseparable(decays)
    cotangent = normal(BATCH, 12, HEADS, 3)
    got = torch.autograd.grad(sma(q, k, v, mask, impl=impl), leaves, cotangent)
    dense = torch.ones(BATCH, HEADS, 12, 12, dtype=torch.float64)
    factors = decays.transpose(1, 2).exp() if kind == "log decay" else decays
    rows = [[factors[..., i + 1 : j + 1].prod(-1) if i <= j else 0 * dense[..., 0, 0] for i in range(12)]
            for j in range(12)]  # fmt: skip
    dense = torch.stack([torch.stack(row, -1) for row in rows], -2)
    wanted = torch.autograd.grad(defined(q, k, v, dense), leaves, cotangent)
    for name, a, b in zip(("dq", "dk", "dv", "ddecays"), got, wanted, strict=True):
        assert_close(name, a, b, dtype=torch.float64, gradient=True)


@pytest.mark.parametrize("impl", ["linear", "quadratic"])
def test_gradients_of_a_toeplitz_mask(impl: str) -> None:
    column, row = normal(HEADS, 9).requires_grad_(), normal(HEADS, 9).requires_grad_()
    q, k, v = (t.requires_grad_() for t in inputs(9, "multi-value"))
    leaves = [q, k, v, column, row]
    cotangent = normal(BATCH, 9, HEADS, 3)
    got = torch.autograd.grad(sma(q, k, v, Toeplitz(column, row), impl=impl), leaves, cotangent)
    distance = torch.arange(9)[:, None] - torch.arange(9)
    dense = torch.where(distance >= 0, column[:, distance.clamp(min=0)], row[:, (-distance).clamp(min=0)])
    wanted = torch.autograd.grad(defined(q, k, v, dense), leaves, cotangent)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert_close(f"gradient {i}", a, b, dtype=torch.float64, gradient=True)


@pytest.mark.parametrize("impl", ["linear", "quadratic"])
def test_keys_and_queries_of_other_lengths(impl: str) -> None:
    q, k, v = normal(BATCH, 6, 1, 5), normal(BATCH, 11, 1, 5), normal(BATCH, 11, HEADS, 3)
    mask = Toeplitz(normal(6), normal(11))
    assert_close("y", sma(q, k, v, mask, impl=impl), defined(q, k, v, mask.to_dense()), dtype=torch.float64)


@pytest.mark.parametrize("impl", ["ssd", "linear", "quadratic"])
def test_normalised_by_the_sum_of_the_weights(impl: str) -> None:
    q, k, v = inputs(10, "multi-head")
    q, k = features.elu_plus_one(q), features.elu_plus_one(k)
    mask = masks.selective(-uniform(BATCH, 10, HEADS))
    weights = torch.einsum("bhts,bthn,bshn->bhts", mask.to_dense(), q, k)
    expected = torch.einsum("bhts,bshp->bthp", weights / weights.sum(-1, keepdim=True), v)
    assert_close("y", sma(q, k, v, mask, normalize=True, impl=impl), expected, dtype=torch.float64)


def test_a_tensor_is_a_mask() -> None:
    q, k, v = inputs(7, "multi-query")
    dense = normal(HEADS, 7, 7)
    assert_close("y", sma(q, k, v, dense), defined(q, k, v, dense), dtype=torch.float64)


@pytest.mark.parametrize("elements", [1, 100, 500])
def test_the_linear_order_in_slices(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(9, "grouped-value")
    mask = Toeplitz(normal(HEADS, 9))
    whole = sma(q, k, v, mask, impl="linear")
    monkeypatch.setattr(module, "CPU_SLICE", elements)
    assert_close("y", sma(q, k, v, mask, impl="linear"), whole, dtype=torch.float64)


def test_masks_are_those_of_the_operators() -> None:
    """Linear attention, RetNet and SSD are structured masked attention with their masks."""
    q, k, v = inputs(20, "multi-head")
    assert_close("linear", sma(q, k, v, MASKS["causal"](20, ())), linear_attention(q, k, v).y, dtype=torch.float64)
    log_decay = -uniform(HEADS)
    expected = retention(q, k, v, log_decay=log_decay, base=None).y
    assert_close("RetNet", sma(q, k, v, masks.decay(log_decay, 20), impl="linear"), expected, dtype=torch.float64)
    dt, A = uniform(BATCH, 20, HEADS), -uniform(HEADS)
    y = sma(q, k, v * dt.unsqueeze(-1), masks.selective(dt * A), impl="quadratic")
    assert_close("SSD", y, ssd(v, dt, A, k, q).y, dtype=torch.float64)


def test_a_decay_close_to_one_keeps_its_precision() -> None:
    q, k, v = (t.float() for t in inputs(4000, "multi-value"))
    log_decay = torch.full((HEADS,), -1e-5)
    y = sma(q, k, v, masks.decay(log_decay, 4000))
    exact = linear_attention(*(t.double() for t in (q, k, v)), log_decay=log_decay.double().expand(BATCH, 4000, HEADS))
    assert_close("y", y, exact.y, dtype=torch.float32)


@pytest.mark.parametrize("impl", ["auto", "linear", "quadratic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, impl: str) -> None:
    q, k, v = (t.to(dtype) for t in inputs(30, "multi-value"))
    log_decay = -uniform(BATCH, 30, HEADS).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = sma(q, k, v, masks.selective(log_decay), impl=impl)
    assert y.dtype == dtype
    exact = defined(q.double(), k.double(), v.double(), masks.selective(log_decay.double()).to_dense())
    assert_close("y", y, exact, dtype=dtype)


def test_no_tokens() -> None:
    q, k, v = inputs(0, "multi-value")
    assert sma(q, k, v, masks.selective(normal(BATCH, 0, HEADS))).shape == (BATCH, 0, HEADS, 3)


def chosen(mask: StructuredMatrix, length: int, width: int) -> str:
    t = torch.empty(1, length, 1, width, device="meta")
    return module._choose("auto", t, t, mask)


def test_auto() -> None:
    assert chosen(masks.causal(8), 8, 64) == "ssd"
    assert chosen(OneSemiseparable(torch.rand(8)), 8, 64) == "ssd"
    assert chosen(OneSemiseparable(torch.full((4096,), 1.5)), 4096, 4) == "linear"
    zero = OneSemiseparable(torch.zeros(8, requires_grad=True))
    assert masks.obstacle(zero) == "OneSemiseparable(8, 8) has a factor of 0 that wants a gradient"
    assert masks.obstacle(OneSemiseparable(torch.zeros(8, dtype=torch.complex64))) is not None
    # A multiplication that is no faster than dense, and a structure that does not say how to multiply.
    assert chosen(Vandermonde(torch.rand(4096), 4096), 4096, 1) == "quadratic"
    assert chosen(LowRank(torch.rand(4096, 1), torch.rand(4096, 1)), 4096, 8) == "linear"
    # Fourier transforms cost T log T a column and there are d_state x headdim columns.
    assert chosen(Toeplitz(torch.rand(512)), 512, 64) == "quadratic"
    assert chosen(Toeplitz(torch.rand(2**14)), 2**14, 4) == "linear"
    assert (
        chosen(Toeplitz(torch.rand(2**14)) + LowRank(torch.rand(2**14, 1), torch.rand(2**14, 1)), 2**14, 4) == "linear"
    )
    assert chosen(Toeplitz(torch.rand(2**14)).mT, 2**14, 4) == "linear"
    assert chosen(SemiseparableMatrix.random(4096, 2), 4096, 4) == "linear"


def call(**changes: Any) -> None:
    q, k, v = inputs(6, "multi-head")
    sma(**{"q": q, "k": k, "v": v, "mask": masks.causal(6, dtype=torch.float64), **changes})


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"q": normal(6, 4, 5)}, ValueError, ["sma: q", "(batch, T, heads, d_state)"]),
        ({"k": normal(2, 6, 4, 4)}, ValueError, ["sma: k", "d_state=5"]),
        ({"v": normal(2, 7, 4, 3)}, ValueError, ["sma: v", "S=6"]),
        ({"v": torch.ones(2, 6, 4, 3).int()}, TypeError, ["sma: v has dtype torch.int32", "bfloat16"]),
        ({"q": torch.ones(2, 6, 4, 5)}, TypeError, ["q has dtype torch.float32", "torch.float64"]),
        ({"mask": masks.causal(7)}, ValueError, ["mask has shape (7, 7)", "T=6, S=6"]),
        ({"mask": normal(3, 4, 6, 6)}, ValueError, ["mask has shape (3, 4, 6, 6)", "batch=2 or 1"]),
        ({"mask": normal(2, 6, 6)}, ValueError, ["mask has 2 heads of 4"]),
        ({"mask": "causal"}, TypeError, ["mask is a str", "StructuredMatrix"]),
        ({"mask": torch.ones(6, 6, device="meta")}, ValueError, ["mask is on meta", "v on cpu"]),
        ({"k": normal(2, 6, 3, 5)}, ValueError, ["k has 3 heads of 4", "one a group"]),
        ({"head_pattern": "multi-query"}, ValueError, ["(4, 4, 4) heads", "'multi-query'", "(4, 1, 1)"]),
        (
            {"head_pattern": "multi-quay"},
            ValueError,
            ["unknown head pattern 'multi-quay'", "Did you mean 'multi-query'"],
        ),
        ({"impl": "chunked"}, ValueError, ["impl='chunked'", "'linear'"]),
        ({"impl": "ssd", "mask": Toeplitz(normal(6))}, ValueError, ["impl='ssd'", "Toeplitz(6, 6)", "1-semiseparable"]),
        ({"impl": "ssd", "mask": OneSemiseparable(2 + uniform(6) * 0)}, ValueError, ["a factor of size 2, over 1"]),
        ({"causal": True, "mask": Toeplitz(normal(6), normal(6))}, ValueError, ["causal=True", "above the diagonal"]),
        ({"causal": True, "mask": Cosine(6)}, ValueError, ["causal=True", "Cosine(6, 6)"]),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        call(**changes)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("pattern", ["mha", "multi-head", "mhs"])
def test_the_head_pattern_that_there_is(pattern: str) -> None:
    call(head_pattern=pattern, causal=True)
