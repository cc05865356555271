"""A layer's matrices, applied to its inputs, are the layer."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dualscan.inspect.views import AttentionView, LayerView, Mamba2View, look
from dualscan.nn.attention import Attention
from dualscan.nn.mamba2 import Mamba2
from dualscan.nn.mlp import MLP
from tests.oracle import relative_error

quick = settings(max_examples=12, deadline=None, derandomize=True)
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}

MIXERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "mamba2": (Mamba2, {"d_state": 8, "headdim": 8}),
    "groups": (Mamba2, {"d_state": 5, "headdim": 4, "ngroups": 4, "norm_groups": 2, "bias": True}),
    "wide convolution": (Mamba2, {"d_state": 4, "headdim": 16, "d_conv": 7, "conv_bias": False}),
    "no convolution": (Mamba2, {"d_state": 4, "headdim": 32, "d_conv": 1, "norm_before_gate": True}),
    "clamped": (Mamba2, {"d_state": 4, "headdim": 8, "dt_limit": (0.01, 0.05)}),
    "attention": (Attention, {"n_heads": 4}),
    "grouped attention": (Attention, {"n_heads": 4, "n_kv_heads": 2, "rope_theta": 100.0, "bias": True}),
}
names = st.sampled_from(sorted(MIXERS))


def layer(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    kind, sizes = MIXERS[name]
    mixer = kind(16, **sizes)
    # Fresh layers have D = 1 and norm weights of 1, which would hide a factor left out.
    with torch.no_grad():
        for parameter in (mixer.get_parameter(p) for p in ("D", "norm.weight") if p in dict(mixer.named_parameters())):
            parameter.normal_()
    return mixer.to(dtype)


def viewed(mixer: nn.Module, seqlen: int, batch: int = 2) -> tuple[LayerView, Tensor]:
    u = torch.randn(batch, seqlen, 16, dtype=mixer.get_parameter("out_proj.weight").dtype)
    view = look(mixer, u)
    assert view is not None
    return view, u


def channels_output(view: LayerView) -> Tensor:
    """Every channel's matrix times the channel, `(batch, seqlen, channels)`."""
    outputs = []
    for c in range(view.inputs.shape[-1]):
        matrix, offset = view.channel(c)
        outputs.append((matrix @ view.inputs[..., c].unsqueeze(-1)).squeeze(-1) + offset)
    return torch.stack(outputs, -1)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@quick
@given(names, st.integers(1, 13))
def test_channel_matrices_times_the_inputs_are_the_layers_output(dtype: torch.dtype, name: str, seqlen: int) -> None:
    mixer = layer(name, dtype)
    view, u = viewed(mixer, seqlen)
    actual = mixer.get_submodule("out_proj")(channels_output(view))
    assert relative_error(actual, mixer(u)[0]) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@quick
@given(names, st.integers(1, 13))
def test_operator_matrices_times_the_values_are_the_layers_output(dtype: torch.dtype, name: str, seqlen: int) -> None:
    mixer = layer(name, dtype)
    view, u = viewed(mixer, seqlen)
    y = torch.einsum("bhls,bshp->blhp", view.operator(), view.values)
    if isinstance(mixer, Mamba2):
        y = y + mixer.D[:, None] * view.values
        y = mixer.norm(y.flatten(-2), mixer.in_proj(u)[..., : mixer.d_inner])
    else:
        y = y.flatten(-2)
    assert relative_error(mixer.get_submodule("out_proj")(y), mixer(u)[0]) <= LIMITS[dtype]


@pytest.mark.parametrize("name", [name for name, (kind, _) in MIXERS.items() if kind is Mamba2])
@torch.no_grad()
def test_mamba2_matrix_is_the_formula_entry_by_entry(name):
    mixer = layer(name)
    assert isinstance(mixer, Mamba2)
    view, u = viewed(mixer, 6, batch=1)
    _, xBC, dt = mixer.in_proj(u).split([mixer.d_inner, mixer.conv1d.in_channels, mixer.nheads], -1)
    padded = nn.functional.pad(xBC.transpose(1, 2), (mixer.d_conv - 1, 0))
    convolved = nn.functional.silu(mixer.conv1d(padded)).transpose(1, 2)
    B, C = convolved[0, :, mixer.d_inner :].chunk(2, -1)
    dt = nn.functional.softplus(dt[0] + mixer.dt_bias).clamp(*mixer.dt_limit)
    expected = torch.zeros(mixer.nheads, 6, 6, dtype=torch.float64)
    for h in range(mixer.nheads):
        group = h // (mixer.nheads // mixer.ngroups)
        own = slice(group * mixer.d_state, (group + 1) * mixer.d_state)
        for i in range(6):
            for j in range(i + 1):
                decay = math.exp(-math.exp(mixer.A_log[h]) * dt[j + 1 : i + 1, h].sum())
                expected[h, i, j] = (C[i, own] @ B[j, own]) * decay * dt[j, h]
    assert relative_error(view.operator()[0], expected) <= 1e-10
    assert view.log_decay is not None
    assert relative_error(view.log_decay[0, :, :, 0], -mixer.A_log.exp() * dt) <= 1e-10


@pytest.mark.parametrize("name", MIXERS)
def test_a_head_shows_the_mean_of_its_channels(name):
    view, _ = viewed(layer(name), 7)
    channels = torch.stack([view.channel(c)[0] for c in range(view.inputs.shape[-1])], 1)
    assert relative_error(view.unified(), channels.unflatten(1, (view.nheads, -1)).mean(2)) <= 1e-10


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("kind", ["operator", "unified"])
def test_matrices_are_causal_and_heads_can_be_taken_in_parts(name, kind):
    view, _ = viewed(layer(name), 9)
    whole = getattr(view, kind)()
    assert whole.shape == (2, view.nheads, 9, 9)
    assert (whole.triu(1) == 0).all()
    assert (whole.diagonal(dim1=-2, dim2=-1) != 0).all()
    parts = [getattr(view, kind)(slice(h, h + 1)) for h in range(view.nheads)]
    assert relative_error(torch.cat(parts, 1), whole) <= 1e-12


def test_rows_of_attention_sum_to_one():
    view, _ = viewed(layer("grouped attention"), 11)
    torch.testing.assert_close(view.operator().sum(-1), torch.ones(2, 4, 11, dtype=torch.float64))


def test_a_model_in_bfloat16_gives_float32_matrices():
    mixer = layer("mamba2", torch.float32).bfloat16()
    u = torch.randn(1, 9, 16).bfloat16()
    view, exact = look(mixer, u), look(mixer.double(), u.double())
    assert isinstance(view, Mamba2View)
    assert isinstance(exact, Mamba2View)
    assert view.operator().dtype == view.unified().dtype == torch.float32
    assert relative_error(view.operator(), exact.operator()) < 2e-2


def test_what_mixes_no_tokens_has_no_view():
    assert look(MLP(16), torch.randn(1, 3, 16)) is None
    assert isinstance(look(Attention(16, 2), torch.randn(1, 3, 16)), AttentionView)
    with pytest.raises(TypeError, match="a Linear cannot be written as a matrix here; the known layers are Attention"):
        look(nn.Linear(2, 2), torch.randn(1, 3, 2))
