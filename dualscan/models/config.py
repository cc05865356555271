"""What a model is: one frozen, validated configuration."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dualscan.models.layers import block
from dualscan.nn.mlp import MLP

_WHOLE = ("d_model", "vocab_size", "vocab_multiple", "d_state", "headdim", "expand", "ngroups", "d_conv")
_WHOLE_OR_NONE = (
    *("d_ssm", "dt_rank", "chunk_size", "norm_groups", "n_heads", "n_kv_heads", "head_dim", "rotary_dim"),
    *("attention_conv", "d_mlp", "n_experts", "experts_per_token", "d_expert", "d_shared"),
    *("router_groups", "router_groups_used", "n_shared", "adapter_rank"),
)
_POSITIVE = ("norm_eps", "inner_norm_eps", "embedding_std", "rope_theta")
_NUMBERS = {"projection_scales": 5, "branch_scales": 4}
_FACTORS = ("attention_scale", "mlp_scale", "gate_scale", "embedding_scale", "residual_scale", "logits_scale")

LAYER_TYPES = {"M": "mamba2", "m": "mamba", "*": "attention", "-": "mlp", "E": "moe", "P": "parallel", "S": "shared"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes and layout of a `MambaLM`.

    Attributes:
        d_model: width of the residual stream.
        pattern: one letter a layer: M Mamba-2, m Mamba, * attention, - MLP, E mixture of experts, P Mamba-2 and
            attention side by side, S Mamba-2 steered by a transformer that layers share.
            "M" * 24 is a pure Mamba-2 model, "MMM*MM-" a hybrid.
        vocab_size: tokens of the vocabulary.
        vocab_multiple: the embedding is padded to a multiple of this many rows.
        d_state: N, state size per channel of Mamba-2 and Mamba.
        headdim: P, channels per head of Mamba-2.
        expand: d_inner / d_model.
        d_ssm: d_inner of Mamba-2 where that is not expand * d_model.
        ngroups: groups of heads that share B and C.
        head_pattern: which of x, B and C of Mamba-2 have a head each, such as "multi-query"; only "grouped-value" has
            groups.
        feature_map: what B and C of Mamba-2 pass, such as "silu+taylor"; a state may be wider than d_state then.
        d_conv: width of the causal convolution.
        dt_rank: width of the bottleneck of Δ in Mamba; None takes d_model / 16, rounded up.
        inner_norms: Mamba normalises the bottleneck of Δ, B and C.
        inner_norm_weights: these norms have weights.
        inner_norm_eps: epsilon of these norms; None takes norm_eps.
        dt_limit: clamp of Δ after softplus.
        chunk_size: tokens a chunk of SSD; None takes the operator's default.
        mamba_bias: bias on the projections of Mamba-2 and Mamba.
        conv_bias: bias on the convolution of Mamba-2 and Mamba.
        norm_before_gate: order of norm and gate in Mamba-2.
        norm_groups: groups of channels that Mamba-2's gated norm treats separately; None takes ngroups.
        gated_norm: False leaves the norm out of Mamba-2, and the gate in.
        projection_scales: factors of z, x, B, C and dt in Mamba-2; None has none.
        branch_scales: factors of a layer P: Mamba-2's input and output, attention's input and output; None has none.
        n_heads: attention heads; None takes d_model / 64, at least 1.
        n_kv_heads: key and value heads of grouped-query attention; None takes n_heads.
        head_dim: width of an attention head; None takes d_model / n_heads.
        rope_theta: base of rotary position embedding; None uses no positions.
        rotary_dim: channels of a head that are rotated; None takes all.
        attention_bias: bias on the projections of attention.
        attention_scale: factor of the scores; None takes 1 / √head_dim.
        attention_conv: width of a causal convolution over queries, keys and values; None has none.
        d_mlp: hidden width of the MLP; None takes its default.
        mlp_activation: "swiglu", "geglu", "gelu" or "relu2"; of the experts, too.
        mlp_bias: bias on the projections of the MLP and of the experts' shared one.
        mlp_scale: factor of what an MLP layer adds.
        gate_scale: factor of an MLP's gate before its activation.
        n_experts: experts of a layer E.
        experts_per_token: experts that a token passes.
        d_expert: hidden width of an expert.
        d_shared: hidden width of the MLP beside the experts that every token passes; None has none.
        router: how experts are chosen and weighted: "topk_softmax", "softmax_topk" or "sigmoid".
        router_groups: groups of experts, for "sigmoid"; None is 1.
        router_groups_used: groups that a token may use; None is 1.
        router_normalize: the weights of a token's experts sum to router_scale, for "sigmoid".
        router_scale: factor of the weights, for "sigmoid".
        n_shared: transformers that the layers S take in turn; None is 1.
        adapter_rank: rank of the adapters of every layer S.
        attention_adapters: the adapters are on q, k and v, too, and not on the MLP alone.
        norm_eps: epsilon of every norm, but where another is said.
        embedding_scale: factor of the embedding.
        residual_scale: factor of what every layer adds.
        logits_scale: factor of the logits.
        tie_embeddings: the output projection is the embedding.
        embedding_std: standard deviation of the embedding at initialisation.

    Raises:
        ValueError: sizes that do not divide, an unknown layer letter, a value out of its range.
        TypeError: a size that is not a whole number.

    Example:
        >>> ModelConfig(d_model=64, pattern="MM*-", vocab_size=256, headdim=32, d_state=16).layer_types
        ('mamba2', 'mamba2', 'attention', 'mlp')
    """

    d_model: int
    pattern: str
    vocab_size: int
    vocab_multiple: int = 16
    d_state: int = 128
    headdim: int = 64
    expand: int = 2
    d_ssm: int | None = None
    ngroups: int = 1
    head_pattern: str = "grouped-value"
    feature_map: str = "silu"
    d_conv: int = 4
    dt_rank: int | None = None
    inner_norms: bool = False
    inner_norm_weights: bool = True
    inner_norm_eps: float | None = None
    dt_limit: tuple[float, float] = (0.0, math.inf)
    chunk_size: int | None = None
    mamba_bias: bool = False
    conv_bias: bool = True
    norm_before_gate: bool = False
    norm_groups: int | None = None
    gated_norm: bool = True
    projection_scales: tuple[float, float, float, float, float] | None = None
    branch_scales: tuple[float, float, float, float] | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = None
    rotary_dim: int | None = None
    attention_bias: bool = False
    attention_scale: float | None = None
    attention_conv: int | None = None
    d_mlp: int | None = None
    mlp_activation: str = "swiglu"
    mlp_bias: bool = False
    mlp_scale: float = 1.0
    gate_scale: float = 1.0
    n_experts: int | None = None
    experts_per_token: int | None = None
    d_expert: int | None = None
    d_shared: int | None = None
    router: str = "topk_softmax"
    router_groups: int | None = None
    router_groups_used: int | None = None
    router_normalize: bool = True
    router_scale: float = 1.0
    n_shared: int | None = None
    adapter_rank: int | None = None
    attention_adapters: bool = False
    norm_eps: float = 1e-5
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    tie_embeddings: bool = True
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        for name in (*_WHOLE, *_WHOLE_OR_NONE):
            value = getattr(self, name)
            if value is None and name in _WHOLE_OR_NONE:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}={value!r} must be a whole number.")
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be a positive number.")
        for name in _FACTORS:
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name}={value} must be a finite number.")
        pair = isinstance(self.dt_limit, tuple) and len(self.dt_limit) == 2
        if not pair or not 0 <= self.dt_limit[0] <= self.dt_limit[1]:
            raise ValueError(f"dt_limit={self.dt_limit} must be (low, high) with 0 <= low <= high; (0.0, inf) is none.")
        for name, count in _NUMBERS.items():
            value = getattr(self, name)
            if value is not None and (len(value) != count or not all(map(math.isfinite, value))):
                raise ValueError(f"{name}={value} must be {count} finite numbers, or None.")
        self._check_layers()

    def _check_layers(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise ValueError(f"pattern={self.pattern!r} has no layers; use one letter a layer, such as 'MMMM'.")
        for letter in self.pattern:
            if letter not in LAYER_TYPES:
                known = ", ".join(f"{key} {name}" for key, name in LAYER_TYPES.items())
                raise ValueError(f"pattern={self.pattern!r} has the unknown layer {letter!r}; the letters are {known}.")
        if "E" in self.pattern:
            for name in ("n_experts", "experts_per_token", "d_expert"):
                if getattr(self, name) is None:
                    raise ValueError(f"pattern={self.pattern!r} has experts (E), which need {name}.")
        if "S" in self.pattern and self.adapter_rank is None:
            raise ValueError(f"pattern={self.pattern!r} has shared transformers (S), which need adapter_rank.")
        # Layers know their own rules; on the meta device they allocate nothing.
        with torch.device("meta"):
            for kind in dict.fromkeys(self.layer_types):
                block(self, kind)

    @property
    def n_layers(self) -> int:
        """Layers, counting every letter of the pattern."""
        return len(self.pattern)

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The pattern in words."""
        return tuple(LAYER_TYPES[letter] for letter in self.pattern)

    @property
    def d_inner(self) -> int:
        """Channels inside Mamba-2 and Mamba: expand * d_model, or d_ssm."""
        return self.expand * self.d_model if self.d_ssm is None else self.d_ssm

    @property
    def nheads(self) -> int:
        """Heads of Mamba-2: d_inner / headdim."""
        return self.d_inner // self.headdim

    @property
    def attention_heads(self) -> int:
        """Heads of an attention layer."""
        return max(1, self.d_model // 64) if self.n_heads is None else self.n_heads

    @property
    def mlp_width(self) -> int:
        """Hidden width of an MLP layer."""
        return MLP.default_hidden(self.d_model, self.mlp_activation) if self.d_mlp is None else self.d_mlp

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding, and width of the logits."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an infinite dt_limit becomes None."""
        values = dataclasses.asdict(self)
        values["dt_limit"] = [None if math.isinf(v) else v for v in self.dt_limit]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`.

        Args:
            values: field names and values, as read from JSON.

        Returns:
            The configuration.

        Raises:
            ValueError: an unknown or a missing field.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                close = difflib.get_close_matches(name, fields, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; the fields are {', '.join(fields)}."
                raise ValueError(f"unknown model setting {name!r}{hint}")
        for name in ("d_model", "pattern", "vocab_size"):
            if name not in values:
                raise ValueError(f"the model configuration has no {name!r}; it needs d_model, pattern and vocab_size.")
        values = dict(values)
        if isinstance(values.get("dt_limit"), (list, tuple)):
            values["dt_limit"] = tuple(math.inf if v is None else float(v) for v in values["dt_limit"])
        for name in _NUMBERS:
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(**values)
