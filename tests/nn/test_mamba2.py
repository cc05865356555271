"""The Mamba-2 block: every way through it gives the same numbers, and its parameters start as the paper says."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualscan.nn import init
from dualscan.nn.mamba2 import Mamba2, Mamba2State
from dualscan.ops.ssd import ssd
from tests.oracle import assert_close
from tests.strategies import pack_lengths, packed

quick = settings(max_examples=15, deadline=None, derandomize=True)

SIZES: dict[str, dict[str, Any]] = {
    "default": {},
    "groups": {"ngroups": 2, "norm_groups": 1},
    "everything": {
        "ngroups": 4,
        "d_conv": 3,
        "bias": True,
        "conv_bias": False,
        "dt_limit": (0.002, 0.05),
        "norm_before_gate": True,
        "chunk_size": 5,
    },
    "no memory in the convolution": {"d_conv": 1},
    "wide convolution": {"d_conv": 8, "expand": 1, "headdim": 6},
}


def layer(dtype: torch.dtype = torch.float32, **options: Any) -> Mamba2:
    return Mamba2(24, **{"d_state": 10, "headdim": 12, **options}).to(dtype)


def same_state(actual: Mamba2State, expected: Mamba2State, *, dtype: torch.dtype = torch.float32) -> None:
    assert_close("conv state", actual.conv, expected.conv, dtype=dtype)
    assert_close("ssm state", actual.ssm, expected.ssm, dtype=dtype)


@pytest.mark.parametrize("sizes", SIZES)
def test_is_the_composition_of_its_operators(sizes: str) -> None:
    """Written out once more from the figure, without the block's own splitting and shapes."""
    block = layer(torch.float64, **SIZES[sizes])
    u = torch.randn(2, 17, 24, dtype=torch.float64)
    e, bc, heads = block.d_inner, block.ngroups * block.d_state, block.nheads
    projected = F.linear(u, block.in_proj.weight, block.in_proj.bias)
    z, xBC, dt = projected[..., :e], projected[..., e : 2 * e + 2 * bc], projected[..., 2 * e + 2 * bc :]
    padded = F.pad(xBC.mT, (block.d_conv - 1, 0))
    xBC = F.silu(F.conv1d(padded, block.conv1d.weight, block.conv1d.bias, groups=xBC.shape[-1])).mT
    assert block.norm is not None
    x = xBC[..., :e].unflatten(-1, (heads, block.headdim))
    B, C = (t.unflatten(-1, (block.ngroups, -1)) for t in (xBC[..., e : e + bc], xBC[..., e + bc :]))
    delta = F.softplus(dt + block.dt_bias).clamp(*block.dt_limit)
    y = ssd(x, delta, -block.A_log.exp(), B, C, D=block.D, impl="recurrent").y.flatten(-2)
    gate, groups = F.silu(z), SIZES[sizes].get("norm_groups", block.ngroups)
    before = SIZES[sizes].get("norm_before_gate", False)
    grouped = (y if before else y * gate).unflatten(-1, (groups, -1))
    y = (grouped / (grouped.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * block.norm.weight
    expected = F.linear(y * gate if before else y, block.out_proj.weight, block.out_proj.bias)
    assert_close("y", block(u)[0], expected, dtype=torch.float64)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sizes", SIZES)
def test_step_by_step_equals_the_whole(sizes: str, batch: int, grad: bool) -> None:
    block, u = layer(**SIZES[sizes]), torch.randn(batch, 11, 24)
    with torch.set_grad_enabled(grad):
        whole, last = block(u)
        ys, state = [], None
        for token in u.split(1, dim=1):
            y, state = block(token, state)
            ys.append(y)
    assert_close("y", torch.cat(ys, 1), whole, dtype=torch.float32)
    same_state(state, last)


@quick
@given(st.integers(0, 20), st.integers(0, 20), st.sampled_from(sorted(SIZES)))
def test_prefill_in_two_at_any_cut(first: int, rest: int, sizes: str) -> None:
    block, u = layer(**SIZES[sizes]), torch.randn(2, first + rest, 24)
    whole, last = block(u)
    y1, state = block(u[:, :first])
    y2, state = block(u[:, first:], state)
    assert_close("y", torch.cat([y1, y2], 1), whole, dtype=torch.float32)
    same_state(state, last)


def test_gradients_flow_through_the_state() -> None:
    block, u, cotangent = layer(), torch.randn(2, 12, 24), torch.randn(2, 12, 24)
    names, parameters = zip(*block.named_parameters(), strict=True)
    whole = torch.autograd.grad(block(u)[0], parameters, cotangent)
    y1, state = block(u[:, :5])
    y2, _ = block(u[:, 5:], state)
    cut = torch.autograd.grad(torch.cat([y1, y2], 1), parameters, cotangent)
    for name, actual, expected in zip(names, cut, whole, strict=True):
        assert_close(name, actual, expected, dtype=torch.float32, gradient=True)


@quick
@given(pack_lengths(), st.booleans())
def test_packed_is_each_sequence_alone(lengths: list[int], continued: bool) -> None:
    block = layer(ngroups=2)
    u = torch.randn(1, sum(lengths), 24)
    starts = None
    if continued:
        _, starts = block(torch.randn(len(lengths), 6, 24))
    y, states = block(u, starts, packed(lengths))
    bounds = [0, *itertools.accumulate(lengths)]
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        own = None if starts is None else Mamba2State(*(t[i : i + 1] for t in starts))
        alone, state = block(u[:, start:end], own)
        assert_close(f"y of {i}", y[:, start:end], alone, dtype=torch.float32)
        same_state(Mamba2State(*(t[i : i + 1] for t in states)), state)


def test_no_rows_and_no_tokens() -> None:
    block = layer(ngroups=2)
    for batch, seqlen in ((0, 5), (0, 1), (2, 0)):
        y, state = block(torch.randn(batch, seqlen, 24))
        y2, state = block(torch.randn(batch, 1, 24), state)
        assert y.shape == (batch, seqlen, 24)
        assert y2.shape == (batch, 1, 24)
        assert len(state.ssm) == batch


def test_states_are_values() -> None:
    """No call changes a state that it was given, not through a view either."""
    block, u = layer(), torch.randn(2, 9, 24)
    with torch.no_grad():
        _, state = block(u)
        before = [t.clone() for t in state]
        for n, cu_seqlens in ((1, None), (4, None), (0, None)):
            _, after = block(torch.randn(2, n, 24), state, cu_seqlens)
            if n:
                for old, new in zip(state, after, strict=True):
                    new.fill_(7.0)
                    assert not (old == 7.0).any()
        block(torch.randn(1, 5, 24), state, packed([2, 3]))
    for old, kept in zip(state, before, strict=True):
        assert torch.equal(old, kept)


def test_the_state_does_not_keep_the_sequence_alive() -> None:
    """What is carried between calls owns memory of its own size, not a view into the activations."""
    with torch.no_grad():
        _, state = layer()(torch.randn(1, 500, 24))
    for t in state:
        assert t.untyped_storage().nbytes() == t.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_stays_close(dtype: torch.dtype) -> None:
    block = layer(dtype)
    u = torch.randn(2, 20, 24).to(dtype)
    y, state = block(u)
    assert y.dtype == state.conv.dtype == dtype
    assert state.ssm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = Mamba2(24, d_state=10, headdim=12).double()
    exact.load_state_dict(block.state_dict())
    expected = exact(u.double())[0]
    # Four roundings to the dtype lie between u and y: projection, convolution, SSD, norm; the oracle's row counts one.
    assert_close("y", (y.double() - expected) / 4 + expected, expected, dtype=dtype)
    with torch.no_grad():
        ys, state = [], None
        for token in u[:1].split(1, dim=1):
            out, state = block(token, state)
            ys.append(out)
    stepped = torch.cat(ys, 1)
    assert_close("steps", (stepped.double() - expected[:1]) / 4 + expected[:1], expected[:1], dtype=dtype)


def test_autocast() -> None:
    block, u = layer(), torch.randn(2, 20, 24)
    exact = block(u)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = block(u)
        y2, _ = block(torch.randn(2, 1, 24), state)
    assert state.ssm.dtype == torch.float32
    assert y.dtype == y2.dtype == torch.bfloat16
    assert_close("y", (y.double() - exact) / 4 + exact, exact.double(), dtype=torch.bfloat16)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_initialisation_is_the_papers() -> None:
    heads = 4096
    A = init.decay_rates(heads).exp()
    assert A.min() >= 1
    assert A.max() <= 16
    # Uniform: mean 8.5, standard deviation 15 / sqrt(12); four standard errors.
    assert abs(A.mean().item() - 8.5) < 4 * 15 / math.sqrt(12 * heads)
    dt = F.softplus(init.step_size_bias(heads).double())
    assert dt.min() >= 1e-3 * (1 - 1e-5)
    assert dt.max() <= 1e-1 * (1 + 1e-5)
    # Log-uniform over two decades.
    assert abs(dt.log10().mean().item() + 2) < 4 * 2 / math.sqrt(12 * heads)
    assert (F.softplus(init.step_size_bias(64, low=1e-6, high=1e-5, floor=1e-4)) - 1e-4).abs().max() < 1e-7
    projection = torch.nn.Linear(300, 200)
    init.scale_residual_projection(projection.weight, 9)
    bound = 1 / math.sqrt(300) / 3
    assert projection.weight.abs().max() <= bound
    assert abs(projection.weight.std().item() - bound / math.sqrt(3)) < 4 * bound / math.sqrt(projection.weight.numel())


def test_parameters_have_the_published_names_and_shapes() -> None:
    shapes = {name: tuple(p.shape) for name, p in layer(ngroups=2, bias=True).named_parameters()}
    assert shapes == {
        "A_log": (4,),
        "dt_bias": (4,),
        "D": (4,),
        "in_proj.weight": (2 * 48 + 2 * 2 * 10 + 4, 24),
        "in_proj.bias": (2 * 48 + 2 * 2 * 10 + 4,),
        "conv1d.weight": (48 + 2 * 2 * 10, 1, 4),
        "conv1d.bias": (48 + 2 * 2 * 10,),
        "norm.weight": (48,),
        "out_proj.weight": (24, 48),
        "out_proj.bias": (24,),
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"headdim": 13}, ["headdim=13", "d_inner=48", "expand 2 x d_model 24", "use a divisor such as 16"]),
        ({"headdim": 0}, ["headdim=0"]),
        ({"ngroups": 3}, ["ngroups=3", "nheads=4", "use 1"]),
        ({"ngroups": 0}, ["ngroups=0", "nheads=4"]),
        ({"norm_groups": 5}, ["norm_groups=5", "d_inner=48"]),
        ({"d_conv": 9}, ["d_conv=9", "1 to 8"]),
        ({"d_conv": 0}, ["d_conv=0", "1 to 8"]),
        ({"d_state": 0}, ["d_state=0", "at least 1"]),
    ],
)
def test_bad_sizes(options: dict[str, int], words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        layer(**options)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("u", "words"),
    [
        (torch.randn(2, 5, 25), ["u has shape (2, 5, 25)", "d_model=24"]),
        (torch.randn(5, 24), ["u has shape (5, 24)", "(batch, seqlen, d_model=24)"]),
    ],
)
def test_bad_input(u: Tensor, words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        layer()(u)
    for word in words:
        assert word in str(raised.value)


def test_foreign_states_and_packs() -> None:
    block, u = layer(), torch.randn(2, 5, 24)
    _, state = block(u)
    with pytest.raises(ValueError, match=r"initial_states has shape \(2, .*batch=3"):
        block(torch.randn(3, 5, 24), state)
    with pytest.raises(ValueError, match=r"batch=2 with cu_seqlens"):
        block(u, None, packed([2, 3]))


def test_operators_of_the_block_compile_to_one_graph() -> None:
    torch._dynamo.reset()
    block, u = layer(), torch.randn(2, 12, 24)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    y, state = compiled(u)
    expected, _ = block(u)
    assert torch.equal(y, expected)
    start = Mamba2State(*(t.detach() for t in state))
    assert torch.equal(compiled(u[:, :1], start)[0], block(u[:, :1], start)[0])
