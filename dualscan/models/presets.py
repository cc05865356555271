"""Named sizes: the published Mamba-2 and Mamba models and small ones for a CPU."""

import dataclasses
import difflib
from typing import Any

from dualscan.models.config import ModelConfig

# GPT-NeoX vocabulary of the published models, padded to 50288 rows for Mamba-2, to 50280 for Mamba.
_NEOX = 50277
_BYTES = 257
_ATTENDED = (9, 18, 27, 36, 45, 56)


def _published(d_model: int, n_layers: int) -> ModelConfig:
    return ModelConfig(d_model=d_model, pattern="M" * n_layers, vocab_size=_NEOX)


def _published_mamba(d_model: int, n_layers: int) -> ModelConfig:
    return ModelConfig(d_model=d_model, pattern="m" * n_layers, vocab_size=_NEOX, vocab_multiple=8, d_state=16)


def _hybrid(pattern: str, **sizes: Any) -> ModelConfig:
    """Attention as in the published 2.7B hybrid: 30 heads of 128 channels, 64 of them rotated, after a convolution."""
    return ModelConfig(
        d_model=2560,
        pattern=pattern,
        vocab_size=_NEOX,
        n_heads=30,
        head_dim=128,
        attention_conv=4,
        rope_theta=10000.0,
        rotary_dim=64,
        **sizes,
    )


def _study(pattern: str) -> ModelConfig:
    return ModelConfig(
        d_model=4096,
        pattern=pattern,
        vocab_size=256000,
        ngroups=8,
        d_mlp=16384,
        mlp_activation="gelu",
        tie_embeddings=False,
        n_heads=32,
        n_kv_heads=8,
    )


def _small(**sizes: Any) -> ModelConfig:
    # Short runs learn faster with an embedding of unit variance and an output projection of its own (docs/log.md).
    return ModelConfig(vocab_size=_BYTES, tie_embeddings=False, embedding_std=1.0, **sizes)


PRESETS: dict[str, ModelConfig] = {
    "mamba2_130m": _published(768, 24),
    "mamba2_370m": _published(1024, 48),
    "mamba2_780m": _published(1536, 48),
    "mamba2_1_3b": _published(2048, 48),
    "mamba2_2_7b": _published(2560, 64),
    "mamba_130m": _published_mamba(768, 24),
    "mamba_370m": _published_mamba(1024, 48),
    "mamba_790m": _published_mamba(1536, 48),
    "mamba_1_4b": _published_mamba(2048, 48),
    "mamba_2_8b": _published_mamba(2560, 64),
    # The hybrids of section 9.2.3 of arXiv 2405.21060: the published one with six attention layers, and 28 + 4 and 32
    # mixers with as many MLPs, as wide as keeps the size.
    "mamba2_attention_2_7b": _hybrid("".join("*" if i in _ATTENDED else "M" for i in range(64))),
    "mamba2_mlp_attention_2_7b": _hybrid("-".join("MMMMMM*MMMMM*MMMMMM*MMMMM*MMMMMM") + "-", d_mlp=5120),
    "mamba2_mlp_2_7b": _hybrid("M-" * 32, d_mlp=5120),
    # The 8B study (arXiv 2406.07887): 24 Mamba-2, 4 attention and 28 MLP layers without positions, and Mamba-2 alone.
    "mamba2_hybrid_8b": _study("M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"),
    "mamba2_8b": _study("M" * 56),
    # Byte-level models that a laptop trains; "demo" is what `make demo` trains, "tiny" what the tests use.
    "tiny": _small(d_model=32, pattern="MM", d_state=16, headdim=16),
    "demo": _small(d_model=192, pattern="MMMM", d_state=32),
    "small": _small(d_model=384, pattern="M" * 8, d_state=64),
    "small_hybrid": _small(d_model=256, pattern="MMM*MMM-", d_state=64),
    "small_transformer": _small(d_model=256, pattern="*-*-*-*-", d_state=64, rope_theta=10000.0, n_heads=4),
}


def preset(name: str, **overrides: Any) -> ModelConfig:
    """The configuration of a named size.

    Args:
        name: one of `PRESETS`.
        **overrides: fields of `ModelConfig` to change, such as `vocab_size=32000`.

    Returns:
        A `ModelConfig`.

    Raises:
        ValueError: an unknown name or field; lists what exists.

    Example:
        >>> preset("mamba2_130m").padded_vocab_size
        50288
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}.{hint}")
    return ModelConfig.from_dict({**dataclasses.asdict(PRESETS[name]), **overrides})
