"""What a model costs: parameters, FLOPs, and bytes of state, from the configuration alone.

Conventions: a multiply-add is 2 FLOPs; matrix products and updates and reads of states count, elementwise work does not
(it is bound by memory, not arithmetic). With d = d_model, e = d_inner, N = d_state, P = headdim, H = nheads, G =
ngroups, W = d_conv, Q = chunk, V = padded vocabulary, one Mamba-2 layer has

    in_proj  d (2e + 2GN + H)        conv  (e + 2GN)(W + 1)        A_log, dt_bias, D  3H        norm  e        out_proj
    e d

parameters and, beside its pre-norm's d, nothing else. A token costs 2 FLOPs a weight of the two projections, 2 W a
channel of the convolution, and SSD's 2 (G Q N + H Q P + 2 H P N) in the chunked form (section 6 of arXiv 2405.21060) or
2 · 2 H P N in a one-token step (update and read of the state). In other head patterns than grouped values x, B and C
have fewer or more channels; a feature map makes N wider behind the convolution.

One Mamba layer, with R = dt_rank, has

    in_proj  2 d e        conv  e (W + 1)        x_proj  e (R + 2N)        dt_proj  (R + 1) e        A_log, D  e (N + 1)
    out_proj  e d

parameters, and its scan takes 2 · 2 e N FLOPs a token, over a sequence and in a step alike.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from dualscan.models.config import ModelConfig
from dualscan.models.layers import block, blocks
from dualscan.nn.attention import Attention
from dualscan.nn.hybrid.moe import MoE
from dualscan.nn.mamba import StepSizeProjection
from dualscan.ops._recompute import Recompute, check_recompute
from dualscan.ops.selective_scan.library import backward_flops as scan_backward_flops
from dualscan.ops.selective_scan.library import forward_flops as scan_forward_flops
from dualscan.ops.sma.features import feature_size
from dualscan.ops.sma.heads import head_counts
from dualscan.ops.ssd.blocks import DEFAULT_CHUNK_SIZE
from dualscan.ops.ssd.library import backward_flops, forward_flops


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Parameter counts of a model.

    Attributes:
        embedding: the embedding, padding rows included.
        layers: all residual blocks with their norms.
        head: final norm, and the output projection where it is not tied.
    """

    embedding: int
    layers: int
    head: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.layers + self.head


def parameters(config: ModelConfig) -> Parameters:
    """Counts parameters without memory for them.

    Args:
        config: the model.

    Returns:
        `Parameters`.

    Example:
        >>> from dualscan.models.presets import preset
        >>> round(parameters(preset("mamba2_130m")).total / 1e6, 1)
        129.0
    """
    embedding = config.padded_vocab_size * config.d_model
    with torch.device("meta"):
        counted = nn.ModuleList(blocks(config))
    layers = sum(parameter.numel() for parameter in counted.parameters())
    return Parameters(
        embedding=embedding, layers=layers, head=config.d_model + (0 if config.tie_embeddings else embedding)
    )


def forward_flops_per_sequence(config: ModelConfig, seqlen: int, *, batch: int = 1, logits: int | None = None) -> int:
    """FLOPs of a forward pass (prefill) over `batch` sequences.

    Args:
        config: the model.
        seqlen: tokens a sequence.
        batch: sequences.
        logits: positions whose logits are computed; None is all of them.

    Returns:
        FLOPs. Attention adds 2 · 2 · (seqlen / 2) · d for the causal half of its two products.
    """
    total = 0
    for kind in config.layer_types:
        total += 2 * _matrix_weights(config, kind) * batch * seqlen
    for kind in _mixers(config):
        if kind == "mamba2":
            total += _conv_flops(config, kind, batch * seqlen) + forward_flops(*_ssd_sizes(config, batch, seqlen))
        elif kind == "mamba":
            scan = scan_forward_flops(batch, seqlen, config.d_inner, config.d_state)
            total += _conv_flops(config, kind, batch * seqlen) + scan
        elif kind == "attention":
            total += 2 * batch * seqlen * seqlen * _attention_width(config) + _attention_conv_flops(
                config, batch * seqlen
            )
    positions = seqlen if logits is None else logits
    return total + 2 * batch * positions * config.padded_vocab_size * config.d_model


def training_flops_per_sequence(config: ModelConfig, seqlen: int, *, batch: int = 1) -> int:
    """FLOPs of a forward and a backward pass.

    Args:
        config: the model.
        seqlen: tokens a sequence.
        batch: sequences.

    Returns:
        FLOPs: every matrix product once forward and twice backward, SSD and Mamba's scan by their own backward formulas
            (they rebuild states).
    """
    total = 3 * forward_flops_per_sequence(config, seqlen, batch=batch)
    for kind in _mixers(config):
        if kind == "mamba2":
            sizes = _ssd_sizes(config, batch, seqlen)
            total += backward_flops(*sizes) - 2 * forward_flops(*sizes)
        elif kind == "mamba":
            scan = batch, seqlen, config.d_inner, config.d_state
            total += scan_backward_flops(*scan) - 2 * scan_forward_flops(*scan)
    return total


class TrainingMemory(NamedTuple):
    """What a setting of `recompute` costs.

    Attributes:
        kept: bytes that the layers' forward leaves in memory for the backward.
        flops: FLOPs that the backward does again.
    """

    kept: int
    flops: int


def training_memory(
    config: ModelConfig, *, tokens: int, recompute: Recompute = "none", matrix_bytes: int = 2
) -> TrainingMemory:
    """What the Mamba-2 layers of a model keep for the backward, and compute again in it.

    With c = e + 2GN the channels of the convolution and m bytes an element of the matrix products, a layer keeps for
    every token

        "none"          4 d + m (d + (e + c + H) + c + 2 e)    the inputs of norms, products, convolution and SSD
        "convolution"   4 d + m (d + (e + c + H) + 2 e)        all of these but the convolution's output
        "activations"   4 d + m ((e + c + H) + e)              the residual stream, what in_proj and SSD gave
        "block"         4 d                                    the residual stream

    (on Hopper GPUs "none" keeps e N / 128 bytes more, SSD's states every 256 tokens), and once, except for "block", the
    matrices in the dtype of the products where that is not float32. "convolution" computes it again, "activations" the
    norms too, "block" everything before out_proj; elementwise work is not counted as FLOPs.

    Args:
        config: the model; layers other than Mamba-2 are not counted.
        tokens: in a micro-batch.
        recompute: as in `Mamba2`.
        matrix_bytes: 2 under bfloat16 autocast, 4 in float32.

    Returns:
        `TrainingMemory` of plain layers by the kernels for NVIDIA GPUs; the forms for CPUs keep 20
        bytes a token and head besides. The embedding, the loss, parameters, gradients and the optimizer are not in it.

    Example:
        >>> from dualscan.models.presets import preset
        >>> plain, less = (
        ...     training_memory(preset("mamba2_130m"), tokens=16384, recompute=r) for r in ("none", "activations")
        ... )
        >>> round(plain.kept / 2**30, 1), round(less.kept / 2**30, 1)
        (7.9, 4.9)
    """
    layers = config.layer_types.count("mamba2")
    d, e, conv = config.d_model, config.d_inner, _conv_channels(config, "mamba2")
    weights = _matrix_weights(config, "mamba2")
    projected = e + conv + config.nheads
    most = d + projected + conv + e + e
    kept = {"none": most, "convolution": most - conv, "activations": projected + e, "block": 0}
    per_token = 4 * d + matrix_bytes * kept[check_recompute(recompute)]
    casts = matrix_bytes * weights if recompute != "block" and matrix_bytes != 4 else 0
    convolution = _conv_flops(config, "mamba2", tokens)
    flops = {"none": 0, "convolution": convolution, "activations": convolution}
    if recompute == "block":
        ssd = forward_flops(*_ssd_sizes(config, 1, tokens))
        flops["block"] = 2 * (weights - d * e) * tokens + convolution + ssd
    return TrainingMemory(layers * (tokens * per_token + casts), layers * flops[recompute])


def step_flops(config: ModelConfig, *, context: int = 0, batch: int = 1) -> int:
    """FLOPs of generating one token for each of `batch` sequences.

    Args:
        config: the model.
        context: tokens before it; only attention layers notice.
        batch: sequences.

    Returns:
        FLOPs: 2 a weight, 4 a state element, 4 a cached key element.
    """
    total = 0
    for kind in config.layer_types:
        total += 2 * _matrix_weights(config, kind)
    for kind in _mixers(config):
        if kind in ("mamba2", "mamba"):
            total += _conv_flops(config, kind, 1) + 4 * config.d_inner * _state_width(config, kind)
        elif kind == "attention":
            total += 4 * (context + 1) * _attention_width(config) + _attention_conv_flops(config, 1)
    return batch * (total + 2 * config.padded_vocab_size * config.d_model)


def state_bytes(config: ModelConfig, *, batch: int = 1, context: int = 0, activation_bytes: int = 4) -> int:
    """Bytes of the state that generation carries.

    Args:
        config: the model.
        batch: sequences.
        context: tokens before; the state of Mamba-2 and Mamba does not grow with it, attention's cache does.
        activation_bytes: bytes of an activation: 4 in float32, 2 in bfloat16. States of SSD and the scan are float32.

    Returns:
        Bytes: a Mamba-2 layer keeps 4 e N for SSD and (e + 2GN)(W - 1) inputs of the convolution, a Mamba layer 4 e N
            and e (W - 1).
    """
    total = 0
    for kind in _mixers(config):
        if kind in ("mamba2", "mamba"):
            total += 4 * config.d_inner * _state_width(config, kind)
            total += activation_bytes * _conv_channels(config, kind) * (config.d_conv - 1)
        elif kind == "attention":
            total += 2 * activation_bytes * context * _kv_width(config)
            total += activation_bytes * _qkv_width(config) * ((config.attention_conv or 1) - 1)
    return batch * total


def _matrix_weights(config: ModelConfig, kind: str) -> int:
    """Weights of the matrices that a token is multiplied with: of experts, those that it passes."""
    with torch.device("meta"):
        whole = block(config, kind)
    layer = whole.mixer
    total = sum(
        module.weight.numel() for module in whole.modules() if isinstance(module, (nn.Linear, StepSizeProjection))
    )
    if isinstance(layer, MoE):
        experts = (m.weight for m in (layer.gate_proj, layer.up_proj, layer.out_proj) if m is not None)
        used = layer.router.per_token / layer.n_experts
        total += layer.router.weight.numel() + round(used * sum(weight.numel() for weight in experts))
    return total


def _mixers(config: ModelConfig) -> list[str]:
    """The kinds of mixers of all layers; some layers have two."""
    two = ["mamba2", "attention"]
    return [mixer for kind in config.layer_types for mixer in (two if kind in ("parallel", "shared") else [kind])]


def _ssd_sizes(config: ModelConfig, batch: int, seqlen: int) -> tuple[int, int, int, int, int, int, int]:
    chunk = config.chunk_size or DEFAULT_CHUNK_SIZE
    heads = head_counts(config.head_pattern, config.nheads, config.ngroups)
    ngroups, d_state = max(heads.q, heads.k), _state_width(config, "mamba2")
    return batch, seqlen, config.nheads, config.headdim, ngroups, d_state, chunk


def _state_width(config: ModelConfig, kind: str) -> int:
    return feature_size(config.feature_map, config.d_state) if kind == "mamba2" else config.d_state


def _conv_flops(config: ModelConfig, kind: str, tokens: int) -> int:
    return 2 * tokens * _conv_channels(config, kind) * config.d_conv


def _conv_channels(config: ModelConfig, kind: str) -> int:
    if kind == "mamba":
        return config.d_inner
    heads = head_counts(config.head_pattern, config.nheads, config.ngroups)
    return heads.v * config.headdim + (heads.q + heads.k) * config.d_state


def _attention_width(config: ModelConfig) -> int:
    return config.attention_heads * _head_dim(config)


def _kv_width(config: ModelConfig) -> int:
    return (config.n_kv_heads or config.attention_heads) * _head_dim(config)


def _qkv_width(config: ModelConfig) -> int:
    return _attention_width(config) + 2 * _kv_width(config)


def _attention_conv_flops(config: ModelConfig, tokens: int) -> int:
    return 2 * tokens * _qkv_width(config) * (config.attention_conv or 0)


def _head_dim(config: ModelConfig) -> int:
    return config.head_dim or Attention.default_head_dim(config.d_model, config.attention_heads)
