"""Head patterns and feature maps of the Mamba-2 block: the same rules as the standard one, and their own sizes."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dualscan.nn.features import FeatureMap
from dualscan.nn.mamba2 import Mamba2
from dualscan.ops.sma import features
from dualscan.ops.sma.heads import PATTERNS
from dualscan.ops.ssd import ssd
from tests.oracle import assert_close
from tests.strategies import pack_lengths, packed

quick = settings(max_examples=15, deadline=None, derandomize=True)

MAPS = ("identity", "silu", "exp", "relu", "layer_norm", "rms_norm+square", "silu+taylor", "cosformer", "rfa")
MAPS += ("l2_norm+performer",)
VARIANTS: dict[str, dict[str, Any]] = {
    **{pattern: {"head_pattern": pattern} for pattern in PATTERNS},
    **{name: {"feature_map": name} for name in MAPS},
    "groups and a map": {"ngroups": 2, "feature_map": "silu+taylor"},
    "both": {"head_pattern": "multi-query", "feature_map": "relu+cosformer"},
}
variants = st.sampled_from(sorted(VARIANTS))


def layer(dtype: torch.dtype = torch.float64, **options: Any) -> Mamba2:
    return Mamba2(24, **{"d_state": 5, "headdim": 12, **options}).to(dtype)


def published(block: Mamba2, u: Tensor) -> Tensor:
    """Written out from figure 6 and table 5 of arXiv 2405.21060, with the recurrence and repeated heads."""
    e, h, p, n = block.d_inner, block.nheads, block.headdim, block.d_state
    counts = block.heads
    projected = F.linear(u, block.in_proj.weight)
    z, xBC, dt = projected[..., :e], projected[..., e:-h], projected[..., -h:]
    xBC = F.conv1d(F.pad(xBC.mT, (3, 0)), block.conv1d.weight, block.conv1d.bias, groups=xBC.shape[-1]).mT
    x, B, C = xBC.split([counts.v * p, counts.k * n, counts.q * n], dim=-1)
    x, B, C = F.silu(x).unflatten(-1, (-1, p)), B.unflatten(-1, (-1, n)), C.unflatten(-1, (-1, n))
    if block.feature_map is None:
        B, C = F.silu(B), F.silu(C)
    else:
        C, B = block.feature_map(C, B)
    x, B, C = (t.repeat_interleave(h // t.shape[2], dim=2) for t in (x, B, C))
    y = ssd(x, F.softplus(dt + block.dt_bias), -block.A_log.exp(), B, C, D=block.D, impl="recurrent").y
    gated = y.flatten(-2) * F.silu(z)
    assert block.norm is not None
    groups = e // (block.norm.group_size or e)
    gated = gated.unflatten(-1, (groups, -1))
    normed = (gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2)
    return F.linear(normed * block.norm.weight, block.out_proj.weight)


@pytest.mark.parametrize("variant", VARIANTS)
def test_is_what_the_paper_says(variant: str) -> None:
    block, u = layer(**VARIANTS[variant]), torch.randn(2, 17, 24, dtype=torch.float64)
    names, parameters = zip(*block.named_parameters(), strict=True)
    actual, expected = block(u)[0], published(block, u)
    assert_close("y", actual, expected, dtype=torch.float64)
    cotangent = torch.randn_like(actual)
    gradients = [torch.autograd.grad(y, parameters, cotangent) for y in (actual, expected)]
    for name, got, wanted in zip(names, *gradients, strict=True):
        assert_close(name, got, wanted, dtype=torch.float64, gradient=True)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_step_by_step_equals_the_whole(variant: str, grad: bool) -> None:
    block, u = layer(torch.float32, **VARIANTS[variant]), torch.randn(2, 9, 24)
    with torch.set_grad_enabled(grad):
        whole, last = block(u)
        ys, state = [], None
        for token in u.split(1, dim=1):
            y, state = block(token, state)
            ys.append(y)
    assert state is not None
    assert_close("y", torch.cat(ys, 1), whole, dtype=torch.float32)
    assert_close("ssm state", state.ssm, last.ssm, dtype=torch.float32)
    assert_close("conv state", state.conv, last.conv, dtype=torch.float32)


@quick
@given(st.integers(0, 12), st.integers(0, 12), variants)
def test_prefill_in_two_at_any_cut(first: int, rest: int, variant: str) -> None:
    block, u = layer(**VARIANTS[variant]), torch.randn(2, first + rest, 24, dtype=torch.float64)
    whole, last = block(u)
    y1, state = block(u[:, :first])
    y2, state = block(u[:, first:], state)
    assert_close("y", torch.cat([y1, y2], 1), whole, dtype=torch.float64)
    assert_close("ssm state", state.ssm, last.ssm, dtype=torch.float64)


@quick
@given(pack_lengths(), variants)
def test_packed_is_each_sequence_alone(lengths: list[int], variant: str) -> None:
    block, u = layer(**VARIANTS[variant]), torch.randn(1, sum(lengths), 24, dtype=torch.float64)
    y, states = block(u, None, packed(lengths))
    for i, (start, end) in enumerate(itertools.pairwise([0, *itertools.accumulate(lengths)])):
        alone, state = block(u[:, start:end])
        assert_close(f"y of {i}", y[:, start:end], alone, dtype=torch.float64)
        assert_close(f"state of {i}", states.ssm[i : i + 1], state.ssm, dtype=torch.float64)


@pytest.mark.parametrize(
    ("pattern", "layers", "millions"),
    [
        ("multi-value", 24, 126.5),
        ("multi-query", 24, 126.5),
        ("multi-key", 24, 126.5),
        ("multi-head", 15, 127.6),
        ("multi-state", 36, 129.6),
    ],
)
def test_sizes_of_the_published_ablation(pattern: str, layers: int, millions: float) -> None:
    """Table 5 of arXiv 2405.21060: width 768, N = P = 64, 24 heads, the embedding of 50257 tokens padded to 50288."""
    with torch.device("meta"):
        block = Mamba2(768, d_state=64, headdim=64, head_pattern=pattern)
    assert block.nheads == 24
    a_layer = sum(p.numel() for p in block.parameters()) + 768
    assert (layers * a_layer + 50288 * 768 + 768) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_plain_is_what_the_step_kernel_computes() -> None:
    assert layer().plain
    assert layer(ngroups=2).plain
    assert layer(head_pattern="mva").plain
    assert layer(head_pattern="mha").plain
    assert layer(head_pattern="mha").ngroups == 4
    assert not any(layer(head_pattern=name).plain for name in ("mqa", "mka", "mss"))
    assert not layer(feature_map="identity").plain


def test_feature_maps_change_the_state_width_only() -> None:
    block = layer(torch.float32, feature_map="silu+taylor")
    y, state = block(torch.randn(1, 3, 24))
    assert y.shape == (1, 3, 24)
    assert state.ssm.shape == (1, 4, 12, features.feature_size("silu+taylor", 5)) == (1, 4, 12, 21)
    assert state.ssm.dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS)
def test_low_precision_model(variant: str) -> None:
    block = layer(torch.float32, **VARIANTS[variant]).bfloat16()
    y, state = block(torch.randn(1, 6, 24).bfloat16())
    y2, _ = block(torch.randn(1, 1, 24).bfloat16(), state)
    assert y.dtype == y2.dtype == torch.bfloat16
    assert bool(y.isfinite().all())
    assert state.ssm.dtype == torch.float32


def test_norms_of_a_feature_map_stay_in_float32_and_out_of_weight_decay() -> None:
    psi = FeatureMap("layer_norm+square", 4).bfloat16()
    parameters = dict(psi.named_parameters())
    assert sorted(parameters) == [f"stages.0.{role}_{kind}" for role in "kq" for kind in ("bias", "weight")]
    assert all(p.dtype == torch.float32 and p.ndim == 1 for p in parameters.values())


def test_queries_and_keys_have_norms_of_their_own_and_one_projection() -> None:
    psi, x = FeatureMap("layer_norm", 4), torch.randn(1, 3, 2, 4)
    nn.init.constant_(psi.get_parameter("stages.0.q_weight"), 2.0)
    q, k = psi(x, x)
    torch.testing.assert_close(q, 2 * k)
    psi = FeatureMap("performer", 4)
    assert torch.equal(*psi(x, x))
    assert "stages.0.projection" in psi.state_dict()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_pattern": "mqx"}, ["unknown head pattern 'mqx'", "multi-query"]),
        ({"head_pattern": "mqa", "ngroups": 2}, ["ngroups=2", "'grouped-value'"]),
        ({"feature_map": "tayler"}, ["unknown feature map 'tayler'", "Did you mean 'taylor'?"]),
        ({"feature_map": "cosformer+relu"}, ["must be the last"]),
    ],
)
def test_bad_options(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        layer(**options)
    for word in words:
        assert word in str(raised.value)
