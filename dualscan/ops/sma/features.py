"""Kernel feature maps ψ: attention weights ψ(q) · ψ(k) in place of exp(q · k) (section 9.4.3 of arXiv 2405.21060).

Functions of the last dimension, which may be composed: `taylor(silu(x))`. The maps with parameters, and names for all
of them, are in `dualscan.nn.features`.
"""

import difflib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dualscan.ops.sma.rotation import rotate


def identity(x: Tensor) -> Tensor:
    """x itself."""
    return x


def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x), also called Swish: the default of Mamba-2."""
    return F.silu(x)


def exp(x: Tensor) -> Tensor:
    """The exponential of every element."""
    return x.exp()


def relu(x: Tensor) -> Tensor:
    """The positive part."""
    return F.relu(x)


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, positive: the first linear attention (arXiv 2006.16236, section 3.2)."""
    return F.elu(x) + 1


def layer_norm(x: Tensor) -> Tensor:
    """Mean 0 and variance 1."""
    return F.layer_norm(x, x.shape[-1:])


def rms_norm(x: Tensor) -> Tensor:
    """Mean square 1."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)


def l2_norm(x: Tensor) -> Tensor:
    """Length 1."""
    return F.normalize(x, dim=-1)


def square(x: Tensor) -> Tensor:
    """x ⊗ x, so that the kernel is (q · k)² (ReBased, arXiv 2402.10644, after a `layer_norm`).

    Args:
        x: `(..., n)`.

    Returns:
        `(..., n (n + 1) / 2)`: of two equal products one is kept, times √2.

    Example:
        >>> q, k = torch.randn(2, 5)
        >>> torch.allclose(square(q) @ square(k), (q @ k) ** 2, atol=1e-5)
        True
    """
    row, column = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    weight = (1 + (row != column).to(x.dtype)).sqrt()
    return x[..., row] * x[..., column] * weight


def taylor(x: Tensor) -> Tensor:
    """The kernel exp(q · k / √n) to second order, 1 + s + s²/2 with s = q · k / √n (Based, arXiv 2402.18668).

    Args:
        x: `(..., n)`.

    Returns:
        `(..., 1 + n + n (n + 1) / 2)`.

    Example:
        >>> q, k = torch.randn(2, 4)
        >>> s = q @ k / 2
        >>> torch.allclose(taylor(q) @ taylor(k), 1 + s + s**2 / 2, atol=1e-5)
        True
    """
    x = x * x.shape[-1] ** -0.25
    return torch.cat([torch.ones_like(x[..., :1]), x, square(x) / math.sqrt(2.0)], dim=-1)


def cosformer(x: Tensor, angles: Tensor) -> Tensor:
    """relu(x) turned by the position, so that the kernel is relu(q) · relu(k) cos(difference of the angles).

    (cosFormer, section 3 of arXiv 2202.08791, with the angle π t / 2M at position t.)

    Args:
        x: `(..., n)`.
        angles: broadcasts to `(..., n)`, radians.

    Returns:
        `(..., 2 n)`.
    """
    x = F.relu(x)
    return rotate(torch.cat([x, torch.zeros_like(x)], dim=-1), angles)


def rfa(x: Tensor, projection: Tensor) -> Tensor:
    """Random Fourier features of x / |x|; the kernel has the mean exp(q̂ · k̂ - 1) (arXiv 2103.02143, section 3).

    Args:
        x: `(..., n)`.
        projection: `(m, n)`, from `random_projection`.

    Returns:
        `(..., 2 m)`.
    """
    angles = F.linear(l2_norm(x), projection.to(x.dtype))
    return torch.cat([angles.sin(), angles.cos()], dim=-1) / math.sqrt(projection.shape[0])


def performer(x: Tensor, projection: Tensor) -> Tensor:
    """Positive random features; the kernel has the mean exp(q · k) (arXiv 2009.14794, lemma 1).

    Args:
        x: `(..., n)`.
        projection: `(m, n)`, from `random_projection`.

    Returns:
        `(..., m)`, positive. exp(w · x - |x|²/2), which overflows only where |w|² / 2 does.
    """
    exponents = F.linear(x, projection.to(x.dtype)) - x.square().sum(-1, keepdim=True) / 2
    return exponents.exp() / math.sqrt(projection.shape[0])


def random_projection(m: int, n: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Normal directions that are orthogonal in blocks of n: the variance of random features is smaller than with
    independent ones (arXiv 2009.14794, section 2.4).

    Args:
        m: number of directions.
        n: width of what is projected.
        generator: source of randomness; None is PyTorch's.

    Returns:
        `(m, n)` float32; every row is distributed as N(0, I).
    """
    blocks = []
    for _ in range(-(-m // n)):
        q, r = torch.linalg.qr(torch.randn(n, n, generator=generator))
        blocks.append(q * r.diagonal().sign())  # without the signs, q is not uniform among the rotations
    lengths = torch.randn(m, n, generator=generator).norm(dim=-1, keepdim=True)
    return torch.cat(blocks)[:m] * lengths


def same(n: int) -> int:
    """The width of a map that keeps it."""
    return n


# name -> width of the features of n numbers, with as many random directions as numbers. Names join as "silu+taylor".
SIZES: dict[str, Callable[[int], int]] = {
    **dict.fromkeys(("identity", "silu", "exp", "relu", "elu_plus_one", "layer_norm", "rms_norm", "l2_norm"), same),
    "square": lambda n: n * (n + 1) // 2,
    "taylor": lambda n: 1 + n + n * (n + 1) // 2,
    "cosformer": lambda n: 2 * n,
    "rfa": lambda n: 2 * n,
    "performer": same,
}


def stages(name: str) -> list[str]:
    """The maps of a name such as "silu+taylor", first to last.

    Raises:
        ValueError: an unknown map, or one after cosFormer: its turning must come last to be undone in a state.
    """
    parts = str(name).split("+")
    for part in parts:
        if part not in SIZES:
            close = difflib.get_close_matches(part, SIZES, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"unknown feature map {part!r}; use one of {', '.join(SIZES)}, or several joined by '+'.{hint}"
            )
    if "cosformer" in parts[:-1]:
        raise ValueError(f"feature map {name!r}: cosformer turns by the position and must be the last; put it there.")
    return parts


def feature_size(name: str, n: int) -> int:
    """Width of the features of n numbers.

    Args:
        name: a feature map, or several joined by "+".
        n: width of the queries and keys.

    Returns:
        Width of ψ(q) and ψ(k).

    Raises:
        ValueError: an unknown map.

    Example:
        >>> feature_size("silu+taylor", 16)
        153
    """
    for stage in stages(name):
        n = SIZES[stage](n)
    return n
