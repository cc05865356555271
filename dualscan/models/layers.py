"""From a configuration to its layers: which module each letter of the pattern stands for."""

from typing import TYPE_CHECKING

from torch import nn

from dualscan.nn.attention import Attention
from dualscan.nn.block import Block
from dualscan.nn.hybrid.moe import MoE
from dualscan.nn.hybrid.parallel import Parallel
from dualscan.nn.hybrid.scaled import ScaledBlock
from dualscan.nn.hybrid.shared import SharedBlock, SharedTransformer
from dualscan.nn.mamba import Mamba
from dualscan.nn.mamba2 import Mamba2
from dualscan.nn.mlp import MLP

if TYPE_CHECKING:
    from dualscan.models.config import ModelConfig


def blocks(config: "ModelConfig") -> list[Block]:
    """All residual blocks of a model; those of kind "shared" take their transformers in turn."""
    made: list[Block] = []
    shared: list[SharedTransformer] = []
    uses = 0
    for kind in config.layer_types:
        if kind != "shared":
            made.append(block(config, kind))
            continue
        owns = len(shared) < (config.n_shared or 1)
        if owns:
            shared.append(_transformer(config))
        made.append(_shared(config, shared[uses % len(shared)], owns=owns))
        uses += 1
    return made


def block(config: "ModelConfig", kind: str) -> Block:
    """The residual block of a kind of layer, one of `config.layer_types`; a shared one with a transformer of its own.

    Raises:
        ValueError: sizes that do not fit.
    """
    if kind == "shared":
        return _shared(config, _transformer(config), owns=True)
    scale = config.residual_scale * (config.mlp_scale if kind == "mlp" else 1.0)
    if scale == 1.0:
        return Block(config.d_model, mixer(config, kind), norm_eps=config.norm_eps)
    return ScaledBlock(config.d_model, mixer(config, kind), norm_eps=config.norm_eps, scale=scale)


def mixer(config: "ModelConfig", kind: str) -> nn.Module:
    """The mixer of a kind of layer, one of `config.layer_types`."""
    return _MIXERS[kind](config)


def _mamba2(config: "ModelConfig") -> Mamba2:
    return Mamba2(
        config.d_model,
        d_state=config.d_state,
        headdim=config.headdim,
        expand=config.expand,
        d_inner=config.d_ssm,
        ngroups=config.ngroups,
        head_pattern=config.head_pattern,
        feature_map=config.feature_map,
        d_conv=config.d_conv,
        dt_limit=config.dt_limit,
        chunk_size=config.chunk_size,
        norm_eps=config.norm_eps,
        norm_before_gate=config.norm_before_gate,
        norm_groups=config.norm_groups,
        gated_norm=config.gated_norm,
        projection_scales=config.projection_scales,
        bias=config.mamba_bias,
        conv_bias=config.conv_bias,
    )


def _mamba(config: "ModelConfig") -> Mamba:
    return Mamba(
        config.d_model,
        d_state=config.d_state,
        expand=config.expand,
        d_conv=config.d_conv,
        dt_rank=config.dt_rank,
        inner_norms=config.inner_norms,
        inner_norm_weights=config.inner_norm_weights,
        norm_eps=config.norm_eps if config.inner_norm_eps is None else config.inner_norm_eps,
        bias=config.mamba_bias,
        conv_bias=config.conv_bias,
    )


def _attention(config: "ModelConfig") -> Attention:
    return Attention(
        config.d_model,
        config.attention_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        rotary_dim=config.rotary_dim,
        bias=config.attention_bias,
        scale=config.attention_scale,
        d_conv=config.attention_conv,
    )


def _mlp(config: "ModelConfig") -> MLP:
    return MLP(
        config.d_model,
        config.d_mlp,
        activation=config.mlp_activation,
        bias=config.mlp_bias,
        gate_scale=config.gate_scale,
    )


def _moe(config: "ModelConfig") -> MoE:
    assert config.n_experts is not None
    assert config.experts_per_token is not None
    assert config.d_expert is not None
    return MoE(
        config.d_model,
        n_experts=config.n_experts,
        per_token=config.experts_per_token,
        d_expert=config.d_expert,
        d_shared=config.d_shared,
        activation=config.mlp_activation,
        bias=config.mlp_bias,
        router=config.router,
        groups=config.router_groups or 1,
        groups_used=config.router_groups_used or 1,
        normalize=config.router_normalize,
        scale=config.router_scale,
    )


def _parallel(config: "ModelConfig") -> Parallel:
    mamba_in, mamba_out, attention_in, attention_out = config.branch_scales or (1.0,) * 4
    return Parallel(
        [_mamba2(config), _attention(config)],
        in_scales=(mamba_in, attention_in),
        out_scales=(mamba_out, attention_out),
    )


def _transformer(config: "ModelConfig") -> SharedTransformer:
    attention = Attention(
        2 * config.d_model,
        config.attention_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        rotary_dim=config.rotary_dim,
        bias=config.attention_bias,
        scale=config.attention_scale,
        d_out=config.d_model,
    )
    return SharedTransformer(config.d_model, attention, _mlp(config), norm_eps=config.norm_eps)


def _shared(config: "ModelConfig", transformer: SharedTransformer, *, owns: bool) -> SharedBlock:
    assert config.adapter_rank is not None
    return SharedBlock(
        config.d_model,
        _mamba2(config),
        transformer,
        owns=owns,
        rank=config.adapter_rank,
        attention_adapters=config.attention_adapters,
        norm_eps=config.norm_eps,
    )


_MIXERS = {"mamba2": _mamba2, "mamba": _mamba, "attention": _attention, "mlp": _mlp, "moe": _moe, "parallel": _parallel}
