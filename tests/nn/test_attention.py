"""Attention against brute-force softmax and transformers' Llama, and one result for all ways to cut a sequence."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualscan.nn.attention import Attention, AttentionState
from tests.oracle import assert_close
from tests.strategies import packed

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"rope_theta": 100.0},
    "grouped": {"n_kv_heads": 2, "rope_theta": 100.0},
    "one key-value head": {"n_kv_heads": 1},
    "wide heads, bias": {"head_dim": 14, "bias": True, "rope_theta": 100.0},
}
D, HEADS = 24, 4


def layer(dtype: torch.dtype = torch.float64, **options: Any) -> Attention:
    return Attention(D, HEADS, **{"n_kv_heads": 2, "rope_theta": 100.0, **options}).to(dtype)


def by_hand(attention: Attention, u: Tensor) -> Tensor:
    """Head by head and token by token: complex rotation, scores, softmax, sum."""
    d, theta = attention.head_dim, attention.rope_theta

    def heads(projection: torch.nn.Linear, turn: bool) -> list[list[Tensor]]:
        tokens = [projection(token).split(d) for token in u]
        if turn and theta is not None:
            tokens = [[rotated(h, t, theta) for h in row] for t, row in enumerate(tokens)]
        return [list(head) for head in zip(*tokens, strict=True)]

    def rotated(h: Tensor, position: int, theta: float) -> Tensor:
        angles = torch.tensor([position * theta ** (-2 * i / d) for i in range(d // 2)], dtype=u.dtype)
        turned = torch.complex(h[: d // 2], h[d // 2 :]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag))

    q, k, v = heads(attention.q_proj, True), heads(attention.k_proj, True), heads(attention.v_proj, False)
    rows = []
    for t in range(len(u)):
        parts = []
        for h in range(len(q)):
            shared = h * len(k) // len(q)
            scores = torch.stack([(q[h][t] * k[shared][s]).sum() / d**0.5 for s in range(t + 1)])
            weights = scores.exp() / scores.exp().sum()
            parts.append(sum(weights[s] * v[shared][s] for s in range(t + 1)))
        rows.append(attention.out_proj(torch.cat(parts)))
    return torch.stack(rows)


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_matches_brute_force(options: dict[str, Any]):
    attention = layer(**{"n_kv_heads": None, "rope_theta": None, **options})
    u, dy = torch.randn(2, 6, D, dtype=torch.float64), torch.randn(2, 6, D, dtype=torch.float64)
    y, _ = attention(u)
    expected = torch.stack([by_hand(attention, row) for row in u])
    assert_close("y", y, expected, dtype=torch.float64)
    parameters = dict(attention.named_parameters())
    actual, wanted = (torch.autograd.grad((out * dy).sum(), list(parameters.values())) for out in (y, expected))
    for name, a, w in zip(parameters, actual, wanted, strict=True):
        if name != "k_proj.bias" or attention.rope_theta is not None:
            assert_close(name, a, w, dtype=torch.float64, gradient=True)


def test_matches_llama():
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=D,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=D // HEADS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config._attn_implementation = "eager"
    theirs, ours = LlamaAttention(config, layer_idx=0), layer(torch.float32, rope_theta=10000.0)
    weights = {name.replace("o_proj", "out_proj"): t for name, t in theirs.state_dict().items()}
    ours.load_state_dict(weights)
    u = torch.randn(2, 15, D)
    hidden = torch.full((15, 15), float("-inf")).triu(1)[None, None]
    positions = LlamaRotaryEmbedding(config)(u, torch.arange(15)[None])
    expected, _ = theirs(u, position_embeddings=positions, attention_mask=hidden)
    assert_close("y", ours(u)[0], expected, dtype=torch.float32)


@settings(deadline=None, max_examples=25)
@given(seqlen=st.integers(0, 12), cuts=st.lists(st.integers(0, 12), max_size=3), batch=st.integers(0, 3))
def test_chunked_prefill_is_the_whole(seqlen, cuts, batch):
    attention, u = layer(), torch.randn(batch, seqlen, D, dtype=torch.float64)
    y, state = attention(u)
    carried, parts = None, []
    for start, end in pairwise([0, *sorted(min(cut, seqlen) for cut in cuts), seqlen]):
        part, carried = attention(u[:, start:end], carried)
        parts.append(part)
    assert_close("y", torch.cat(parts, dim=1), y, dtype=torch.float64)
    _assert_same_state(carried, state)


def test_step_by_step_is_the_whole():
    attention, u = layer(torch.float32), torch.randn(2, 9, D)
    y, state = attention(u)
    carried, parts = None, []
    with torch.inference_mode():
        for token in u.split(1, dim=1):
            part, carried = attention(token, carried)
            parts.append(part)
    assert_close("y", torch.cat(parts, dim=1), y, dtype=torch.float32)
    assert carried is not None
    assert_close("k", carried.k, state.k, dtype=torch.float32)
    assert carried.lengths.tolist() == [9, 9]


@settings(deadline=None, max_examples=25)
@given(pasts=st.lists(st.integers(0, 5), min_size=1, max_size=4), data=st.data())
def test_packed_is_each_sequence_alone(pasts, data):
    """Ragged states go into a packed call, the states that come out into an unpacked step."""
    attention = layer()
    lengths = [data.draw(st.integers(0, 5)) for _ in pasts]
    tokens = [torch.randn(1, p + n + 1, D, dtype=torch.float64) for p, n in zip(pasts, lengths, strict=True)]
    before = [t[:, :p] for t, p in zip(tokens, pasts, strict=True)]
    then = [t[:, p : p + n] for t, p, n in zip(tokens, pasts, lengths, strict=True)]
    first, state = attention(torch.cat(before, dim=1), cu_seqlens=packed(pasts))
    second, state = attention(torch.cat(then, dim=1), state, packed(lengths))
    third, state = attention(torch.cat([t[:, -1:] for t in tokens]), state)
    totals = [p + n + 1 for p, n in zip(pasts, lengths, strict=True)]
    assert state.lengths.tolist() == totals
    firsts, seconds = first.split(pasts, dim=1), second.split(lengths, dim=1)
    for i, t in enumerate(tokens):
        expected, alone = attention(t)
        actual = torch.cat((firsts[i], seconds[i], third[i : i + 1]), dim=1)
        assert_close("y", actual, expected, dtype=torch.float64)
        own = alone._replace(k=state.k[i : i + 1, :, -totals[i] :], v=state.v[i : i + 1, :, -totals[i] :])
        _assert_same_state(own, alone)


def test_packed_without_sequences():
    attention = layer()
    y, state = attention(torch.randn(1, 0, D, dtype=torch.float64), cu_seqlens=packed([]))
    assert y.shape == (1, 0, D)
    assert state.k.shape == (0, 2, 0, 6)
    y, state = attention(torch.randn(1, 0, D, dtype=torch.float64), state, packed([]))
    assert state.lengths.shape == (0,)


def test_sequences_do_not_see_each_other_nor_the_future():
    attention, u = layer(), torch.randn(1, 7, D, dtype=torch.float64, requires_grad=True)
    for t in range(7):
        (du,) = torch.autograd.grad(attention(u, cu_seqlens=packed([4, 3]))[0][0, t].sum(), u)
        reached = du[0].abs().amax(1).nonzero().flatten().tolist()
        assert reached == list(range(0 if t < 4 else 4, t + 1))


def test_gradients_reach_through_the_state():
    attention, u = layer(), torch.randn(2, 8, D, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(attention(u)[0].square().sum(), u)
    first, state = attention(u[:, :5])
    second, _ = attention(u[:, 5:], state)
    (actual,) = torch.autograd.grad(first.square().sum() + second.square().sum(), u)
    assert_close("du", actual, expected, dtype=torch.float64, gradient=True)


def test_the_state_is_a_value():
    attention, u = layer(), torch.randn(2, 5, D, dtype=torch.float64)
    _, state = attention(u)
    kept = AttentionState(*(t.clone() for t in state))
    one, _ = attention(u[:, :1], state)
    again, _ = attention(u[:, :1], state)
    assert torch.equal(one, again)
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lower_precision(dtype: torch.dtype):
    attention, u = layer(dtype), torch.randn(2, 20, D, dtype=dtype)
    exact = layer()
    exact.load_state_dict(attention.state_dict())
    expected, (y, state) = exact(u.double())[0], attention(u)
    assert y.dtype == state.k.dtype == dtype
    assert_close("y", y, expected, dtype=dtype, gradient=True)


def test_shards_by_heads():
    """Two halves of the heads, each with its part of the four projections, sum to the whole layer."""
    whole, u = layer(), torch.randn(2, 6, D, dtype=torch.float64)
    total = torch.zeros_like(u)
    for rank in range(2):
        part = layer()
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(part, name).weight.data = getattr(whole, name).weight.chunk(2, dim=0)[rank]
        part.out_proj.weight.data = whole.out_proj.weight.chunk(2, dim=1)[rank]
        y, state = part(u[:, :4])
        total[:, :4] += y
        total[:, 4:] += part(u[:, 4:], state)[0]
    assert_close("y", total, whole(u)[0], dtype=torch.float64)


def test_compiles_without_a_break():
    attention, u = layer(), torch.randn(2, 6, D, dtype=torch.float64)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    weight, (y, _), (expected, state) = attention.k_proj.weight, compiled(u), attention(u)
    assert_close("y", y, expected, dtype=torch.float64)
    grads = (torch.autograd.grad(out.square().sum(), weight, retain_graph=True)[0] for out in (y, expected))
    assert_close("dweight", *grads, dtype=torch.float64, gradient=True)
    state = AttentionState(*(t.detach() for t in state))
    assert_close("step", compiled(u[:, :1], state)[0], attention(u[:, :1], state)[0], dtype=torch.float64)


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "heads": ({"n_heads": 5}, ["n_heads=5", "d_model=24", "head_dim"]),
    "key-value heads": ({"n_kv_heads": 3}, ["n_kv_heads=3", "n_heads=4", "divisor"]),
    "no heads": ({"n_heads": 0}, ["n_heads=0"]),
    "odd heads": ({"head_dim": 5, "rope_theta": 1e4}, ["head_dim=5", "odd", "rope_theta=None"]),
}


@pytest.mark.parametrize(("wrong", "words"), REFUSED.values(), ids=REFUSED)
def test_refuses_sizes(wrong: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError, match="use") as raised:
        Attention(**{"d_model": D, "n_heads": HEADS, **wrong})
    assert [word for word in words if word not in str(raised.value)] == []


def test_refuses_inputs():
    attention = layer(torch.float32)
    with pytest.raises(ValueError, match=r"\(2, 3, 5\).*d_model=24"):
        attention(torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match=r"to 4.*seqlen=3"):
        attention(torch.randn(1, 3, D), cu_seqlens=packed([4]))
    _, state = attention(torch.randn(2, 3, D))
    with pytest.raises(ValueError, match="holds 2 sequences, the input 3"):
        attention(torch.randn(3, 1, D), state)


def _assert_same_state(actual: AttentionState, expected: AttentionState) -> None:
    assert_close("k", actual.k, expected.k, dtype=torch.float64)
    assert_close("v", actual.v, expected.v, dtype=torch.float64)
    assert torch.equal(actual.lengths, expected.lengths)


def test_convolution_scale_and_partial_rotation():
    """Against the definition, written out for every query; in two calls and in one."""
    width, scale, theta, turned = 3, 0.3, 50.0, 4
    attention = Attention(D, 4, n_kv_heads=2, rope_theta=theta, rotary_dim=turned, scale=scale, d_conv=width).double()
    u = torch.randn(2, 7, D, dtype=torch.float64)
    qkv = torch.cat([p(u) for p in (attention.q_proj, attention.k_proj, attention.v_proj)], dim=-1)
    conv = attention.conv1d
    assert conv is not None
    qkv = torch.nn.functional.pad(qkv.mT, (width - 1, 0))
    qkv = torch.nn.functional.conv1d(qkv, conv.weight, conv.bias, groups=qkv.shape[1]).mT
    q, k, v = (t.unflatten(-1, (-1, D // 4)) for t in qkv.split([D, D // 2, D // 2], dim=-1))

    def turn(x):
        halves = torch.view_as_complex(torch.stack((x[..., : turned // 2], x[..., turned // 2 : turned]), dim=-1))
        angle = torch.arange(7.0)[:, None, None] * theta ** (-torch.arange(turned // 2) / (turned // 2)).double()
        halves = torch.view_as_real(halves * torch.exp(1j * angle))
        return torch.cat((halves[..., 0], halves[..., 1], x[..., turned:]), dim=-1)

    q, k = turn(q), turn(k)
    expected = torch.zeros_like(u)
    for t in range(7):
        heads = []
        for h in range(4):
            scores = (scale * k[:, : t + 1, h // 2] @ q[:, t, h, :, None]).softmax(dim=1)
            heads.append((scores * v[:, : t + 1, h // 2]).sum(1))
        expected[:, t] = attention.out_proj(torch.cat(heads, dim=-1))
    assert_close("whole", attention(u)[0], expected, dtype=torch.float64)
    first, state = attention(u[:, :4])
    second, state = attention(u[:, 4:], state)
    assert_close("pieces", torch.cat((first, second), dim=1), expected, dtype=torch.float64)
    assert state.conv.shape == (2, 2 * D, width - 1)


@pytest.mark.parametrize(("options", "words"), [({"rotary_dim": 3}, "rotary_dim=3"), ({"d_conv": 99}, "d_conv=99")])
def test_refuses_widths(options, words):
    with pytest.raises(ValueError, match=words):
        Attention(D, 4, rope_theta=100.0, **options)
