"""The Mamba block: every way through it gives the same numbers, and those of `transformers`' block."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from dualscan.nn.mamba import Mamba, MambaState
from tests.oracle import assert_close
from tests.strategies import pack_lengths, packed

quick = settings(max_examples=10, deadline=None, derandomize=True)

SIZES: dict[str, dict[str, Any]] = {
    "default": {},
    "everything": {"d_state": 5, "d_conv": 3, "dt_rank": 3, "bias": True, "conv_bias": False, "expand": 1},
}


def layer(dtype: torch.dtype = torch.float32, **options: Any) -> Mamba:
    return Mamba(24, **{"d_state": 8, **options}).to(dtype)


def same_state(actual: MambaState, expected: MambaState) -> None:
    assert_close("conv state", actual.conv, expected.conv, dtype=torch.float32)
    assert_close("ssm state", actual.ssm, expected.ssm, dtype=torch.float32)


@pytest.mark.parametrize("sizes", SIZES)
def test_is_the_block_of_transformers(sizes: str) -> None:
    """Output and every gradient, with a copy of our weights under their own names."""
    block = layer(torch.float64, **SIZES[sizes])
    config = MambaConfig(
        hidden_size=24,
        state_size=block.d_state,
        expand=block.d_inner // 24,
        conv_kernel=block.d_conv,
        time_step_rank=block.dt_rank,
        use_bias=block.in_proj.bias is not None,
        use_conv_bias=block.conv1d.bias is not None,
        num_hidden_layers=1,
    )
    theirs = MambaMixer(config, layer_idx=0).double()
    theirs.load_state_dict(block.state_dict())
    u, cotangent = torch.randn(2, 2, 17, 24, dtype=torch.float64)
    y, expected = block(u)[0], theirs(u)
    # Theirs keeps A in float32.
    assert_close("y", y, expected, dtype=torch.float32)
    y.backward(cotangent)
    expected.backward(cotangent)
    others = dict(theirs.named_parameters())
    for name, p in block.named_parameters():
        assert_close(name, p.grad, others[name].grad, dtype=torch.float32, gradient=True)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_step_by_step_equals_the_whole(sizes: str, grad: bool) -> None:
    block, u = layer(**SIZES[sizes]), torch.randn(2, 11, 24)
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
    block, u = layer(), torch.randn(1, sum(lengths), 24)
    starts = block(torch.randn(len(lengths), 6, 24))[1] if continued else None
    y, states = block(u, starts, packed(lengths))
    bounds = [0, *itertools.accumulate(lengths)]
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        own = None if starts is None else MambaState(*(t[i : i + 1] for t in starts))
        alone, state = block(u[:, start:end], own)
        assert_close(f"y of {i}", y[:, start:end], alone, dtype=torch.float32)
        same_state(MambaState(*(t[i : i + 1] for t in states)), state)


def test_no_rows_and_no_tokens() -> None:
    block = layer()
    for batch, seqlen in ((0, 5), (0, 1), (2, 0)):
        y, state = block(torch.randn(batch, seqlen, 24))
        y2, state = block(torch.randn(batch, 1, 24), state)
        assert y.shape == (batch, seqlen, 24)
        assert y2.shape == (batch, 1, 24)
        assert len(state.ssm) == batch


def test_the_state_does_not_keep_the_sequence_alive() -> None:
    with torch.no_grad():
        _, state = layer()(torch.randn(1, 300, 24))
    for t in state:
        assert t.untyped_storage().nbytes() == t.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_close(dtype: torch.dtype) -> None:
    block = layer(dtype)
    assert block.A_log.dtype == block.D.dtype == block.dt_proj.bias.dtype == torch.float32
    u = torch.randn(2, 20, 24).to(dtype)
    y, state = block(u)
    assert y.dtype == state.conv.dtype == dtype
    assert state.ssm.dtype == torch.float32
    exact = Mamba(24, d_state=8).double()
    exact.load_state_dict(block.state_dict())
    expected = exact(u.double())[0]
    # Six roundings to the dtype lie between u and y: five projections and operators, and Δ once more.
    assert_close("y", (y.double() - expected) / 6 + expected, expected, dtype=dtype)


def test_autocast() -> None:
    block, u = layer(), torch.randn(2, 20, 24)
    exact = block(u)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = block(u)
        y2, _ = block(torch.randn(2, 1, 24), state)
    assert state.ssm.dtype == torch.float32
    assert y.dtype == y2.dtype == torch.bfloat16
    assert_close("y", (y.double() - exact) / 6 + exact, exact.double(), dtype=torch.bfloat16)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_parameters_start_as_the_paper_says() -> None:
    block = Mamba(256, d_state=16)
    assert torch.allclose(block.A_log.exp(), torch.arange(1.0, 17).expand(512, 16))
    assert (block.D == 1).all()
    step = F.softplus(block.dt_proj.bias.double())
    assert step.min() >= 1e-3 * (1 - 1e-5)
    assert step.max() <= 1e-1 * (1 + 1e-5)
    assert block.dt_rank == 16
    weight = block.dt_proj.weight
    assert weight.abs().max() <= 0.25
    # Uniform: standard deviation bound / sqrt(3).
    assert abs(weight.std().item() - 0.25 / 3**0.5) < 0.01


def test_parameters_have_the_published_names_and_shapes() -> None:
    shapes = {name: tuple(p.shape) for name, p in layer(bias=True).named_parameters()}
    assert shapes == {
        "A_log": (48, 8),
        "D": (48,),
        "in_proj.weight": (96, 24),
        "in_proj.bias": (96,),
        "conv1d.weight": (48, 1, 4),
        "conv1d.bias": (48,),
        "x_proj.weight": (2 + 16, 48),
        "dt_proj.weight": (48, 2),
        "dt_proj.bias": (48,),
        "out_proj.weight": (24, 48),
        "out_proj.bias": (24,),
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dt_rank": 0}, ["dt_rank=0", "at least 1", "d_model / 16"]),
        ({"d_conv": 9}, ["d_conv=9", "1 to 8"]),
        ({"d_state": 0}, ["d_state=0", "at least 1"]),
    ],
)
def test_bad_sizes(options: dict[str, int], words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        layer(**options)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("u", [torch.randn(2, 5, 25), torch.randn(5, 24)])
def test_bad_input(u: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Mamba: u has shape .*\(batch, seqlen, d_model=24\)"):
        layer()(u)


def test_foreign_states_and_packs() -> None:
    block, u = layer(), torch.randn(2, 5, 24)
    _, state = block(u)
    with pytest.raises(ValueError, match=r"initial_states has shape \(2, .*batch=3"):
        block(torch.randn(3, 5, 24), state)
    with pytest.raises(ValueError, match=r"batch=2 with cu_seqlens"):
        block(u, None, packed([2, 3]))
