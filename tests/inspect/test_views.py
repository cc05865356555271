"""A layer's matrices, applied to its inputs, are the layer."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dualscan.inspect.layer import LayerView
from dualscan.inspect.selective import mean_of_scans
from dualscan.inspect.views import AttentionView, HeadView, ParallelView, look
from dualscan.nn.attention import Attention
from dualscan.nn.hybrid.parallel import Parallel
from dualscan.nn.mamba import Mamba
from dualscan.nn.mamba2 import Mamba2
from dualscan.nn.mlp import MLP
from tests.oracle import relative_error

quick = settings(max_examples=3, deadline=None, derandomize=True)
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}

Mixer = tuple[type[nn.Module], dict[str, Any]]
PROJECTED = {"projection_scales": (0.5, 2.0, 1.5, 0.7, 1.3)}

MIXERS: dict[str, Mixer] = {
    "mamba2": (Mamba2, {"d_state": 8, "headdim": 8}),
    "groups": (Mamba2, {"d_state": 5, "headdim": 4, "ngroups": 4, "norm_groups": 2, "bias": True}),
    "wide convolution": (Mamba2, {"d_state": 4, "headdim": 16, "d_conv": 7, "conv_bias": False}),
    "no convolution": (Mamba2, {"d_state": 4, "headdim": 32, "d_conv": 1, "norm_before_gate": True}),
    "clamped": (Mamba2, {"d_state": 4, "headdim": 8, "dt_limit": (0.01, 0.05)}),
    "no norm": (Mamba2, {"d_state": 4, "headdim": 8, "d_inner": 40, "gated_norm": False, **PROJECTED}),
    "shared x": (Mamba2, {"d_state": 4, "headdim": 8, "head_pattern": "multi-query"}),
    "feature map": (Mamba2, {"d_state": 4, "headdim": 8, "feature_map": "layer_norm+square"}),
    "mamba": (Mamba, {"d_state": 4}),
    "mamba, uneven": (Mamba, {"d_state": 3, "expand": 3, "d_conv": 2, "bias": True, "conv_bias": False}),
    "mamba with norms inside": (Mamba, {"d_state": 4, "inner_norms": True, "inner_norm_weights": False}),
    "attention": (Attention, {"n_heads": 4}),
    "grouped attention": (Attention, {"n_heads": 4, "n_kv_heads": 2, "rope_theta": 100.0, "bias": True}),
    "attention with convolution": (
        Attention,
        {"n_heads": 2, "head_dim": 6, "d_conv": 3, "scale": 0.3, "n_kv_heads": 1},
    ),
    "partly rotated": (Attention, {"n_heads": 2, "rope_theta": 100.0, "rotary_dim": 4}),
}


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
@pytest.mark.parametrize("name", MIXERS)
@quick
@given(st.integers(1, 13))
def test_channel_matrices_times_the_inputs_are_the_layers_output(dtype: torch.dtype, name: str, seqlen: int) -> None:
    mixer = layer(name, dtype)
    view, u = viewed(mixer, seqlen)
    actual = mixer.get_submodule("out_proj")(channels_output(view))
    assert relative_error(actual, mixer(u)[0]) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", [name for name, (kind, _) in MIXERS.items() if kind is not Mamba])
@quick
@given(st.integers(1, 13))
def test_operator_matrices_times_the_values_are_the_layers_output(dtype: torch.dtype, name: str, seqlen: int) -> None:
    mixer = layer(name, dtype)
    view, u = viewed(mixer, seqlen)
    assert isinstance(view, HeadView)
    y = torch.einsum("bhls,bshp->blhp", view.operator(), view.values)
    if isinstance(mixer, Mamba2):
        y = (y + mixer.D[:, None] * view.values).flatten(-2)
        z = mixer.in_proj(u)[..., : mixer.d_inner] * (mixer.projection_scales or [1.0])[0]
        y = y * nn.functional.silu(z) if mixer.norm is None else mixer.norm(y, z)
    else:
        y = y.flatten(-2)
    assert relative_error(mixer.get_submodule("out_proj")(y), mixer(u)[0]) <= LIMITS[dtype]


@pytest.mark.parametrize("name", ["mamba2", "groups", "wide convolution", "no convolution", "clamped"])
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
    log_decay = view.log_decay()
    assert log_decay is not None
    assert relative_error(log_decay[0, :, :, 0], -mixer.A_log.exp() * dt) <= 1e-10


@pytest.mark.parametrize("seqlen", [1, 2, 7, 8])
@torch.no_grad()
def test_mamba_matrix_is_the_formula_entry_by_entry(seqlen):
    mixer = layer("mamba, uneven")
    assert isinstance(mixer, Mamba)
    view, u = viewed(mixer, seqlen, batch=1)
    assert view.nheads == 3  # 48 channels in groups of 16, which divides both 48 and 64
    x, _ = mixer.in_proj(u).chunk(2, -1)
    padded = nn.functional.pad(x.transpose(1, 2), (mixer.d_conv - 1, 0))
    x = nn.functional.silu(mixer.conv1d(padded)).transpose(1, 2)
    dt, B, C = mixer.x_proj(x)[0].split([mixer.dt_rank, mixer.d_state, mixer.d_state], -1)
    dt, A = nn.functional.softplus(mixer.dt_proj(dt) + mixer.dt_proj.bias), -mixer.A_log.exp()
    expected = torch.zeros(48, seqlen, seqlen, dtype=torch.float64)
    for i in range(seqlen):
        for j in range(i + 1):
            decay = (A * dt[j + 1 : i + 1].sum(0)[:, None]).exp()
            expected[:, i, j] = (decay * C[i] * B[j]).sum(-1) * dt[j]
    assert relative_error(view.operator()[0], expected.unflatten(0, (3, 16)).mean(1)) <= 1e-10
    log_decay = view.log_decay()
    assert log_decay is not None
    assert relative_error(log_decay[0], (dt.unsqueeze(-1) * A).unflatten(1, (3, 16)).flatten(-2)) <= 1e-10


def test_fast_decays_neither_overflow_nor_vanish_in_float32():
    # Δ A spans 1e-3 to 50 a token over 300 tokens: any positive exponent would be infinite.
    dt = torch.rand(1, 300, 1, 4, dtype=torch.float64) * 3
    A = -torch.tensor([[[1e-3, 17.0], [0.1, 5.0], [1.0, 2.0], [0.01, 0.3]]], dtype=torch.float64)
    B, C = torch.randn(2, 1, 300, 2, dtype=torch.float64)
    left, right = torch.randn(2, 1, 300, 1, 4, dtype=torch.float64)
    inputs = (dt, A, B, C, left.unsqueeze(0), right)
    exact = mean_of_scans(*inputs)[0, 0, 0]
    since = dt[0, :, 0].cumsum(0)
    for i, j in ((299, 0), (299, 298), (150, 20), (128, 127), (7, 7)):
        decay = (A[0] * (since[i] - since[j])[:, None]).exp()
        entry = ((decay * C[0, i] * B[0, j]).sum(-1) * dt[0, j, 0] * left[0, i, 0] * right[0, j, 0]).sum()
        assert exact[i, j].item() == pytest.approx(entry.item(), rel=1e-9, abs=1e-14)
    assert relative_error(mean_of_scans(*(t.float() for t in inputs))[0, 0, 0], exact) <= 1e-5


def test_mixers_side_by_side_are_their_heads_one_after_the_other():
    branches = [layer("mamba2"), layer("attention"), layer("mamba")]
    mixer = Parallel(branches, in_scales=(0.5, 2.0, 1.0), out_scales=(3.0, 0.1, 1.0))
    u = torch.randn(2, 9, 16, dtype=torch.float64)
    view = look(mixer, u)
    assert isinstance(view, ParallelView)
    assert view.nheads == 4 + 4 + 1
    outputs = channels_output(view).split([32, 16, 32], -1)
    actual = sum(branch.get_submodule("out_proj")(y) for branch, y in zip(branches, outputs, strict=True))
    assert relative_error(actual, mixer(u)[0]) <= 1e-10
    for kind in ("operator", "unified"):
        whole = getattr(view, kind)()
        parts = [getattr(view, kind)(slice(start, start + 3)) for start in (0, 3, 6)]
        assert relative_error(torch.cat(parts, 1), whole) <= 1e-12
        second = look(branches[1], 2.0 * u)
        assert relative_error(whole[:, 4:8], 0.1 * getattr(second, kind)()) <= 1e-12
    decays = view.log_decay()
    assert decays.shape == (2, 9, 9, 128)
    assert (decays[:, :, 4:8] == 0).all()
    with pytest.raises(IndexError, match="the layer has 80 channels"):
        view.channel(80)


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


@pytest.mark.parametrize("name", ["mamba2", "mamba", "attention with convolution"])
def test_a_model_in_bfloat16_gives_float32_matrices(name):
    mixer = layer(name, torch.float32).bfloat16()
    u = torch.randn(1, 9, 16).bfloat16()
    view, exact = look(mixer, u), look(mixer.double(), u.double())
    assert view is not None
    assert exact is not None
    for kind in ("operator", "unified"):
        assert getattr(view, kind)().dtype == torch.float32
        assert relative_error(getattr(view, kind)(), getattr(exact, kind)()) < 3e-2


def test_what_mixes_no_tokens_has_no_view():
    assert look(MLP(16), torch.randn(1, 3, 16)) is None
    assert isinstance(look(Attention(16, 2), torch.randn(1, 3, 16)), AttentionView)
    with pytest.raises(
        TypeError, match="a Linear cannot be written as a matrix here; the known layers are Attention, Mamba"
    ):
        look(nn.Linear(2, 2), torch.randn(1, 3, 2))
