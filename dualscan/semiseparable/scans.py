"""The scalar scan, y_t = a_t y_{t-1} + x_t, by six algorithms (appendix B of arXiv 2405.21060).

In other words: multiplication by a 1-semiseparable matrix, L_ji = a_j ... a_{i+1}, or the "cumulative product sum". All
six return the same; they differ in work and in depth. For T tokens, in multiply-adds a channel:

| algorithm | work | depth |
|---|---|---|
| `sequential` | T | T |
| `fully_recurrent` | T | T |
| `dilated` | T log T | log T |
| `state_passing`, chunks of Q | T log Q | T/Q log Q |
| `associative` | 2 T | 2 log T |
| `block_scan`, blocks of Q | 2 T | Q + 2 log (T/Q) |

`costs.count` counts them. Each is a factorisation of L into sparse matrices, applied from the right: T of them with one
entry below the diagonal (`fully_recurrent`), log T with one subdiagonal, at distance 1, 2, 4, ... (`dilated`), and so
on.

Shapes: `a` is `(..., T)`, its first entry is not read; `x` is `(..., T, width)`; any dtype, sign and zeros included.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad


def scan(a: Tensor, x: Tensor, *, algorithm: str = "associative", chunk_size: int | None = None) -> Tensor:
    """y_t = a_t y_{t-1} + x_t along dimension -2 of x, starting from nothing (section 3 of arXiv 2405.21060).

    Args:
        a: `(..., T)`, the factors; the first is not read.
        x: `(..., T, width)`, the inputs; leading dimensions broadcast.
        algorithm: "sequential", "fully_recurrent", "dilated", "state_passing", "associative" or "block_scan".
        chunk_size: tokens of a chunk of "state_passing" or of a block of "block_scan"; None: the square root of T.

    Returns:
        y `(..., T, width)`.

    Raises:
        ValueError: for an unknown algorithm, shapes that do not fit, or a chunk size that is not positive or not used.

    Example:
        >>> scan(torch.tensor([0.5, 0.5, -1.0]), torch.tensor([[4.0], [0.0], [1.0]])).flatten().tolist()
        [4.0, 2.0, -1.0]
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r} is none of {', '.join(ALGORITHMS)}")
    if a.ndim < 1 or x.ndim < 2 or a.shape[-1] != x.shape[-2]:
        raise ValueError(f"a {tuple(a.shape)} and x {tuple(x.shape)} must be (..., T) and (..., T, width) of one T")
    batch = torch.broadcast_shapes(a.shape[:-1], x.shape[:-2])
    a, x = a.expand(*batch, a.shape[-1]), x.expand(*batch, *x.shape[-2:])
    if algorithm not in ("state_passing", "block_scan"):
        if chunk_size is not None:
            raise ValueError(f"algorithm={algorithm!r} has no chunks; leave chunk_size={chunk_size} out")
        return ALGORITHMS[algorithm](a, x) if x.numel() else x
    if chunk_size is None:
        chunk_size = max(1, math.isqrt(x.shape[-2]))
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    return ALGORITHMS[algorithm](a, x, chunk_size) if x.numel() else x


def sequential(a: Tensor, x: Tensor) -> Tensor:
    """One token after the other."""
    rows = [x[..., 0, :]]
    for t in range(1, x.shape[-2]):
        rows.append(torch.addcmul(x[..., t, :], a[..., t, None], rows[-1]))
    return torch.stack(rows, dim=-2)


def fully_recurrent(a: Tensor, x: Tensor) -> Tensor:
    """State passing with chunks of one token: the inputs turn into the outputs from left to right."""
    return state_passing(a, x, 1)


def dilated(a: Tensor, x: Tensor) -> Tensor:
    """Each token adds what is 1, then 2, then 4, ... tokens before it (Hillis and Steele 1986)."""
    distance = 1
    while distance < x.shape[-2]:
        far, near = slice(None, -distance), slice(distance, None)
        x = torch.cat(
            [x[..., :distance, :], torch.addcmul(x[..., near, :], a[..., near, None], x[..., far, :])], dim=-2
        )
        a = torch.cat([a[..., :distance], a[..., near] * a[..., far]], dim=-1)
        distance *= 2
    return x


def state_passing(a: Tensor, x: Tensor, chunk_size: int) -> Tensor:
    """Chunk after chunk: the last output of one is added to the first input of the next."""
    outputs: list[Tensor] = []
    for factors, inputs in zip(a.split(chunk_size, dim=-1), x.split(chunk_size, dim=-2), strict=True):
        if outputs:
            first = torch.addcmul(inputs[..., :1, :], factors[..., :1, None], outputs[-1][..., -1:, :])
            inputs = torch.cat([first, inputs[..., 1:, :]], dim=-2)
        outputs.append(dilated(factors, inputs))
    return torch.cat(outputs, dim=-2)


def associative(a: Tensor, x: Tensor) -> Tensor:
    """Neighbours are merged into one token, the half as long sequence is scanned, the rest is filled in.

    Pairs (a, x) compose as (a', x') after (a, x) = (a' a, a' x + x'), which is associative (Blelloch 1990).
    """
    length = x.shape[-2]
    if length == 1:
        return x
    even, odd = slice(0, length - 1, 2), slice(1, None, 2)
    merged = torch.addcmul(x[..., odd, :], a[..., odd, None], x[..., even, :])
    at_odd = associative(a[..., odd] * a[..., even], merged)
    rest = slice(2, None, 2)
    before = at_odd[..., : (length - 1) // 2, :]
    at_even = torch.cat([x[..., :1, :], torch.addcmul(x[..., rest, :], a[..., rest, None], before)], dim=-2)
    paired = torch.stack([at_even[..., : length // 2, :], at_odd], dim=-2).flatten(-3, -2)
    return torch.cat([paired, at_even[..., length // 2 :, :]], dim=-2)


def block_scan(a: Tensor, x: Tensor, chunk_size: int) -> Tensor:
    """All blocks at once, then the sequence of their last outputs, then what each block owes to those before it.

    The decomposition that SSD generalises (section 6): diagonal blocks, and between them blocks of rank one.
    """
    length = x.shape[-2]
    missing = -length % chunk_size
    a = pad(a, (0, missing)).unflatten(-1, (-1, chunk_size))
    x = pad(x, (0, 0, 0, missing)).unflatten(-2, (-1, chunk_size))
    products, rows = [a[..., 0]], [x[..., 0, :]]
    for t in range(1, chunk_size):
        products.append(a[..., t] * products[-1])
        rows.append(torch.addcmul(x[..., t, :], a[..., t, None], rows[-1]))
    ends = associative(products[-1], rows[-1])
    # (..., blocks, chunk_size, width): the first block owes nothing.
    owing, decays = torch.stack(rows, dim=-2), torch.stack(products, dim=-1)
    settled = torch.addcmul(owing[..., 1:, :, :], decays[..., 1:, :, None], ends[..., :-1, None, :])
    return torch.cat([owing[..., :1, :, :], settled], dim=-3).flatten(-3, -2)[..., :length, :]


ALGORITHMS: dict[str, Callable[..., Tensor]] = {
    "sequential": sequential,
    "fully_recurrent": fully_recurrent,
    "dilated": dilated,
    "state_passing": state_passing,
    "associative": associative,
    "block_scan": block_scan,
}
