"""The neighbours equal their published recurrences, written here from the papers, in float64; values and gradients."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualscan.ops.sma import features
from dualscan.ops.sma.heads import expand_heads
from dualscan.ops.sma.neighbours import (
    MLSTMState,
    gated_linear_attention,
    lightning_attention,
    mlstm,
    retention,
    s4d_real,
)
from dualscan.ops.ssd import linear_attention
from tests.oracle import assert_close

quick = settings(max_examples=12, deadline=None, derandomize=True)

lengths = st.integers(2, 40)  # the gates and normalised queries of a single token have no gradient


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def inputs(length: int, *, groups: int = 2, width: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return normal(2, length, groups, width), normal(2, length, groups, width), normal(2, length, 4, 3)


def compare(actual: Callable[..., Tensor], expected: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Values and all gradients of two functions."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = [function(*leaves) for function in (actual, expected)]
    assert_close("y", *outputs, dtype=torch.float64)
    cotangent = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(y, leaves, cotangent) for y in outputs]
    for i, (got, wanted) in enumerate(zip(*gradients, strict=True)):
        assert_close(f"gradient {i}", got, wanted, dtype=torch.float64, gradient=True)


def decayed(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """S_t = α_t S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t, with a gate (batch, seqlen, nheads)."""
    q, k = expand_heads(q, v.shape[2]), expand_heads(k, v.shape[2])
    state, outputs = torch.zeros(*v.shape[:1], v.shape[2], q.shape[-1], v.shape[-1], dtype=v.dtype), []
    for t in range(v.shape[1]):
        state = gate[:, t, :, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 1)


@quick
@given(lengths)
def test_linear_attention(length: int) -> None:
    """arXiv 2006.16236, equations 18 to 20: s_i = s_{i-1} + φ(k) vᵀ, z_i = z_{i-1} + φ(k), y = φ(q)ᵀ s / φ(q)ᵀ z."""

    def published(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (expand_heads(torch.where(t > 0, t + 1, t.exp()), v.shape[2]) for t in (q, k))
        s, z, outputs = 0, 0, []
        for t in range(v.shape[1]):
            s, z = s + k[:, t, :, :, None] * v[:, t, :, None, :], z + k[:, t]
            above = (q[:, t, :, :, None] * s).sum(-2)
            outputs.append(above / (q[:, t] * z).sum(-1, keepdim=True))
        return torch.stack(outputs, 1)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(features.elu_plus_one(q), features.elu_plus_one(k), v, normalize=True).y

    compare(ours, published, *inputs(length))


@quick
@given(lengths)
def test_retention_recurrent_form(length: int) -> None:
    """arXiv 2307.08621, equation 6, with complex numbers as in equation 3."""
    gamma = 1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float64))
    theta = 10000.0 ** (-torch.arange(2, dtype=torch.float64) / 2)

    def published(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (expand_heads(torch.complex(*t.chunk(2, -1)), 4) for t in (q, k))
        turn = torch.polar(torch.ones(2, dtype=torch.float64), theta)
        state, outputs = torch.zeros(2, 4, 2, 3, dtype=torch.complex128), []
        for t in range(v.shape[1]):
            # The state turns instead of the tokens: A = γ e^{iθ} is the diagonal matrix that the paper starts from.
            state = gamma[:, None, None] * turn[:, None] * state + k[:, t, :, :, None].conj() * v[:, t, :, None, :]
            outputs.append((q[:, t, :, :, None] * state).sum(-2).real)
        return torch.stack(outputs, 1)

    compare(lambda *t: retention(*t).y, published, *inputs(length))


@quick
@given(lengths)
def test_retention_parallel_form(length: int) -> None:
    """arXiv 2307.08621, equation 5: (Q Kᵀ ∘ D) V with D_nm = γ^(n - m)."""
    log_decay = -torch.rand(4, dtype=torch.float64)
    place = torch.arange(length)

    def published(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        distance = (place[:, None] - place).clamp(min=0)
        mask = (log_decay[:, None, None] * distance).exp().tril()
        scores = torch.einsum("blhn,bshn->bhls", expand_heads(q, 4), expand_heads(k, 4))
        return torch.einsum("bhls,bshp->blhp", scores * mask, v)

    def ours(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        return retention(q, k, v, log_decay=log_decay, base=None).y

    compare(ours, published, *inputs(length), log_decay)


@quick
@given(st.integers(0, 15), st.integers(0, 15), st.integers(0, 15))
def test_retention_continues_from_a_state(first: int, second: int, third: int) -> None:
    q, k, v = inputs(first + second + third)
    whole = retention(q, k, v)
    y1, state = retention(q[:, :first], k[:, :first], v[:, :first])
    rest = slice(first, first + second)
    y2, state = retention(q[:, rest], k[:, rest], v[:, rest], initial_states=state)
    rest = slice(first + second, None)
    y3, state = retention(q[:, rest], k[:, rest], v[:, rest], initial_states=state)
    assert_close("y", torch.cat([y1, y2, y3], 1), whole.y, dtype=torch.float64)
    assert_close("state", state, whole.final_states, dtype=torch.float64)


def test_retention_of_packed_sequences() -> None:
    q, k, v = (t[:1] for t in inputs(9))
    packed = retention(q, k, v, cu_seqlens=torch.tensor([0, 4, 9], dtype=torch.int32))
    alone = [retention(q[:, part], k[:, part], v[:, part]) for part in (slice(0, 4), slice(4, 9))]
    assert_close("y", packed.y, torch.cat([a.y for a in alone], 1), dtype=torch.float64)
    assert_close("states", packed.final_states, torch.cat([a.final_states for a in alone]), dtype=torch.float64)


@quick
@given(lengths, st.floats(0.0, 0.9))
def test_lightning_attention(length: int, depth: float) -> None:
    """arXiv 2401.04658, the recurrent form, with the decays of arXiv 2307.14995."""
    decay = torch.tensor([math.exp(-8 * h / 4 * (1 - depth)) for h in (1, 2, 3, 4)], dtype=torch.float64)
    compare(
        lambda *t: lightning_attention(*t, depth=depth).y,
        lambda q, k, v: decayed(q, k, v, decay.expand(v.shape[:-1])),
        *inputs(length),
    )


@quick
@given(lengths)
def test_gated_linear_attention(length: int) -> None:
    """arXiv 2312.06635: S_t = G_t ∘ S_{t-1} + k_tᵀ v_t with all of G_t equal."""

    def ours(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return gated_linear_attention(q, k, v, F.logsigmoid(gate) / 16).y

    def published(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return decayed(q, k, v, gate.sigmoid() ** (1 / 16))

    compare(ours, published, *inputs(length), normal(2, length, 4))


def plain_mlstm(q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, log_forget: Tensor) -> Tensor:
    """arXiv 2405.04517, equations 19 to 27, without stabilisation."""
    q, k = expand_heads(q, 4), expand_heads(k, 4) / math.sqrt(k.shape[-1])
    memory, normalizer, outputs = torch.zeros(2, 4, 3, q.shape[-1], dtype=v.dtype), torch.zeros_like(q[:, 0]), []
    for t in range(v.shape[1]):
        i, f = input_gate[:, t, :, None].exp(), log_forget[:, t, :, None].exp()
        memory = f[..., None] * memory + i[..., None] * v[:, t, :, :, None] * k[:, t, :, None, :]
        normalizer = f * normalizer + i * k[:, t]
        below = (normalizer * q[:, t]).sum(-1, keepdim=True).abs().clamp(min=1)
        outputs.append((memory @ q[:, t, :, :, None]).squeeze(-1) / below)
    return torch.stack(outputs, 1)


def stable_mlstm(q: Tensor, k: Tensor, v: Tensor, input_gate: Tensor, log_forget: Tensor) -> Tensor:
    """The same with the stabiliser of equations 15 to 17, token by token."""
    q, k = expand_heads(q, 4), expand_heads(k, 4) / math.sqrt(k.shape[-1])
    memory, normalizer, outputs = torch.zeros(2, 4, 3, q.shape[-1], dtype=v.dtype), torch.zeros_like(q[:, 0]), []
    m = torch.zeros_like(input_gate[:, 0])
    for t in range(v.shape[1]):
        new = torch.maximum(log_forget[:, t] + m, input_gate[:, t])
        i, f = (input_gate[:, t] - new).exp()[..., None], (log_forget[:, t] + m - new).exp()[..., None]
        memory = f[..., None] * memory + i[..., None] * v[:, t, :, :, None] * k[:, t, :, None, :]
        normalizer, m = f * normalizer + i * k[:, t], new
        below = torch.maximum((normalizer * q[:, t]).sum(-1).abs(), (-m).exp())[..., None]
        outputs.append((memory @ q[:, t, :, :, None]).squeeze(-1) / below)
    return torch.stack(outputs, 1)


def mlstm_y(*tensors: Tensor) -> Tensor:
    return mlstm(*tensors).y


@quick
@given(lengths, st.booleans())
def test_mlstm(length: int, exponential: bool) -> None:
    gate = normal(2, length, 4) if exponential else F.logsigmoid(normal(2, length, 4) + 1)
    compare(mlstm_y, plain_mlstm, *inputs(length), normal(2, length, 4), gate)


@quick
@given(st.integers(1, 100), st.sampled_from([1.0, 30.0, 1000.0]))
def test_mlstm_with_gates_that_overflow(length: int, size: float) -> None:
    gates = size * normal(2, length, 4), F.logsigmoid(size * normal(2, length, 4))
    leaves = [t.requires_grad_() for t in (*inputs(length), *gates)]
    y = mlstm(*leaves).y
    assert_close("y", y, stable_mlstm(*leaves), dtype=torch.float64)
    # Where gates saturate, gradients are differences that cancel; their values are tested with milder gates.
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), leaves))


@quick
@given(st.integers(1, 15), st.integers(1, 15))
def test_mlstm_continues_from_a_state(first: int, rest: int) -> None:
    tensors = (*inputs(first + rest), 20 * normal(2, first + rest, 4), F.logsigmoid(normal(2, first + rest, 4)))
    whole = mlstm(*tensors)
    y1, state = mlstm(*(t[:, :first] for t in tensors))
    y2, state = mlstm(*(t[:, first:] for t in tensors), initial_states=state)
    assert_close("y", torch.cat([y1, y2], 1), whole.y, dtype=torch.float64)
    assert_close("memory", state.memory, whole.final_states.memory, dtype=torch.float64)
    assert_close("log scale", state.log_scale, whole.final_states.log_scale, dtype=torch.float64)


def test_mlstm_in_bfloat16_and_without_tokens() -> None:
    tensors = [t.bfloat16() for t in (*inputs(20), normal(2, 20, 4), F.logsigmoid(normal(2, 20, 4)))]
    y = mlstm(*tensors).y
    assert y.dtype == torch.bfloat16
    assert_close("y", y, plain_mlstm(*(t.double() for t in tensors)), dtype=torch.bfloat16)
    y, state = mlstm(*(t[:, :0] for t in tensors))
    assert y.shape == (2, 0, 4, 3)
    assert torch.equal(state.log_scale, torch.zeros(2, 4))


@quick
@given(lengths, st.booleans())
def test_s4d_real(length: int, skip: bool) -> None:
    """arXiv 2206.11893: the recurrence with zero-order hold, and the convolution kernel Σ C B̄ exp(Δ A l)."""
    dt, A = torch.rand(3, dtype=torch.float64) + 0.01, -torch.arange(1.0, 5.0, dtype=torch.float64).repeat(3, 1)
    D = normal(3) if skip else None

    def published(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        decay = (dt[:, None] * A).exp()
        held, h, outputs = (decay - 1) / A * B, torch.zeros(2, 3, 4, dtype=x.dtype), []
        for t in range(x.shape[1]):
            h = decay * h + held * x[:, t, :, None]
            outputs.append((C * h).sum(-1) + (0 if D is None else D * x[:, t]))
        return torch.stack(outputs, 1)

    def ours(*tensors: Tensor) -> Tensor:
        return s4d_real(*tensors, D=D).y

    tensors = normal(2, length, 3), dt, A, normal(3, 4), normal(3, 4)
    compare(ours, published, *tensors)
    x, dt, A, B, C = tensors
    decay = dt[:, None] * A
    kernel = (C * (decay.expm1() / A * B) * (decay * torch.arange(length)[:, None, None]).exp()).sum(-1)
    padded = F.pad(x.mT, (length - 1, 0))
    convolved = F.conv1d(padded, kernel.mT.flip(-1).unsqueeze(1), groups=3).mT
    assert_close("convolution", ours(*tensors), convolved + (0 if D is None else D * x), dtype=torch.float64)


def call(name: str, **changes: Any) -> None:
    q, k, v = inputs(5)
    gates = {"input_gate": normal(2, 5, 4), "log_forget": -normal(2, 5, 4).abs()}
    channels = {"x": normal(2, 5, 3), "dt": torch.ones(3), "A": -torch.ones(3, 4), "B": normal(3, 4), "C": normal(3, 4)}
    arguments = {
        "retention": {"q": q, "k": k, "v": v},
        "mlstm": {"q": q, "k": k, "v": v, **gates},
        "s4d_real": channels,
    }[name]
    {"retention": retention, "mlstm": mlstm, "s4d_real": s4d_real}[name](**{**arguments, **changes})


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("retention", {"q": torch.ones(2, 5, 2, 3)}, ["d_state=3", "odd", "base=None"]),
        ("retention", {"log_decay": torch.zeros(3)}, ["log_decay", "(3,)", "nheads=4"]),
        ("mlstm", {"input_gate": torch.zeros(2, 5, 3)}, ["mlstm: input_gate", "nheads=4"]),
        ("mlstm", {"log_forget": torch.zeros(2, 4, 4)}, ["mlstm: log_forget", "seqlen=5"]),
        ("s4d_real", {"x": torch.zeros(2, 3)}, ["s4d_real: x", "channels"]),
        ("s4d_real", {"A": -torch.ones(2, 4)}, ["s4d_real: A", "channels=3"]),
        ("s4d_real", {"dt": torch.ones(3, 4)}, ["s4d_real: dt", "channels=3"]),
        ("s4d_real", {"B": torch.ones(3, 5)}, ["s4d_real: B", "d_state=4"]),
        ("s4d_real", {"D": torch.ones(4)}, ["s4d_real: D", "channels=3"]),
    ],
)
def test_bad_shapes(name: str, changes: dict[str, Tensor], words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        call(name, **changes)
    for word in words:
        assert word in str(raised.value)


def test_mlstm_state_is_a_value() -> None:
    tensors = (*inputs(4), normal(2, 4, 4), -normal(2, 4, 4).abs())
    state = mlstm(*tensors).final_states
    before = MLSTMState(*(t.clone() for t in state))
    mlstm(*tensors, initial_states=state)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
