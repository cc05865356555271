"""The forward kernel: with S the state at a chunk's start, (n, p) in memory,

Y = exp(cs) C S + ((C B^T) o L s) X + D X,      S' = exp(cs_Q) S + B^T (exp(cs_Q - cs) s X).
"""

import torch
from torch import Tensor

from dualscan.ops._numba import vector
from dualscan.ops._numba.launch import adjacent
from dualscan.ops._numba.product import LANES, TILE_ROWS, multiply, row_of_tiles
from dualscan.ops._numba.vector import ZERO, Kernel, at, device_function, share, store
from dualscan.ops.ssd.cpu.tiles import (
    Problem,
    decay,
    fill,
    prepare,
    read,
    scale_rows,
    shrink,
    strides,
    transpose,
    whole_tiles,
)


def forward(
    x: Tensor,
    scale: Tensor | None,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """`y` and the final states; arguments and results as in `chunked.forward`."""
    problem = Problem(x, B, cu_seqlens, chunk_size)
    q, p, n = problem.q, problem.p, problem.n
    x, B, C = adjacent(x), adjacent(B), adjacent(C)
    y = torch.empty(x.shape, dtype=x.dtype)
    finals = torch.empty(problem.nseq, problem.nheads, problem.headdim, problem.d_state, dtype=torch.float32)
    scratch = torch.empty(
        problem.workers,
        2 * q + 3 * q + 2 * q * p + 3 * q * n + 2 * q * q + problem.together * p * n,
        dtype=torch.float32,
    )
    _FORWARD[x.dtype](
        *problem.sizes(),
        *(*strides(x), *strides(B), *strides(C), y, finals),
        *per_token(scale, log_decay),
        *(skip(D, problem), None if initial_states is None else initial_states.contiguous()),
        *(scratch, scratch.shape[1], problem.items),
        workers=problem.workers,
    )
    return y, finals


def per_token(scale: Tensor | None, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and the log-decay as contiguous float32."""
    log_decay = log_decay.float().contiguous()
    return torch.ones_like(log_decay) if scale is None else scale.float().contiguous(), log_decay


def skip(D: Tensor | None, problem: Problem) -> Tensor:
    """D as `(nheads, headdim)` float32; zeros without one."""
    shape = problem.nheads, problem.headdim
    return (
        torch.zeros(shape, dtype=torch.float32)
        if D is None
        else D.float().reshape(problem.nheads, -1).expand(shape).contiguous()
    )


@device_function
def mask_row(products, sums, scales, i, out):
    """Row `i` of (C B^T) o L s, with zeros up to the end of its register tile."""
    own = sums[i]
    for j in range(i + 1):
        out[j] = products[j] * decay(own - sums[j]) * scales[j]
    for j in range(i + 1, whole_tiles(i + 1)):
        out[j] = ZERO


@device_function
def lower_product(c, ldc, a, a_row, b, ldb, rows, columns, depth):
    """`c = a b` below the diagonal, in whole tiles of a square result."""
    for i in range(0, rows, TILE_ROWS):
        width = min((i + TILE_ROWS + LANES - 1) // LANES * LANES, columns)
        row_of_tiles(at(c, i * ldc), ldc, at(a, i * a_row), a_row, 1, b, ldb, width, depth, 0)


@device_function
def _forward(b, x, B, C, y):
    segments, ngroups, k, together, parts, seqlen = vector.int64(b[2]), b[3], b[4], b[5], b[6], b[7]
    headdim, d_state, chunk, q, p, n = b[8], b[9], b[10], b[11], b[12], b[13]
    x_row, x_token, x_head = b[15], b[16], b[17]
    B_row, B_token, B_group, C_row, C_token, C_group = b[19], b[20], b[21], b[23], b[24], b[25]
    finals, scale, log_decay = vector.float32(b[27]), vector.float32(b[28]), vector.float32(b[29])
    D, initial, given = vector.float32(b[30]), vector.float32(b[31]), b[31] != 0
    nheads = ngroups * k
    begin, end, worker = share(b, b[34])
    base = b[32] + 4 * worker * b[33]
    sums = vector.float64(base)
    scales = at(vector.float32(base), 2 * q)
    from_start, to_end = at(scales, q), at(scales, 2 * q)
    xs = at(scales, 3 * q)
    out = at(xs, q * p)
    Bs = at(out, q * p)
    Cs, Bt = at(Bs, q * n), at(Bs, 2 * q * n)
    CB = at(Bs, 3 * q * n)
    W = at(CB, q * q)
    states = at(W, q * q)
    for item in range(begin, end):
        sequence, part = item // (ngroups * parts), item % parts
        group = item // parts % ngroups
        row, start, length = segments[4 * sequence], segments[4 * sequence + 1], segments[4 * sequence + 2]
        first, last = part * together, min((part + 1) * together, k)
        for local in range(last - first):
            state = at(states, local * p * n)
            fill(state, p * n, ZERO)
            if given:
                source = at(initial, (sequence * nheads + group * k + first + local) * headdim * d_state)
                for i in range(headdim):
                    for j in range(d_state):
                        state[j * p + i] = source[i * d_state + j]
        for c in range(0, length, chunk):
            rows, token = min(chunk, length - c), start + c
            tiled = whole_tiles(rows)
            read(at(B, row * B_row + token * B_token + group * B_group), B_token, rows, d_state, Bs, q, n)
            read(at(C, row * C_row + token * C_token + group * C_group), C_token, rows, d_state, Cs, q, n)
            transpose(Bs, q, n, Bt)
            lower_product(CB, q, Cs, n, Bt, q, tiled, q, d_state)
            fresh = c == 0 and not given
            for local in range(last - first):
                head = group * k + first + local
                state = at(states, local * p * n)
                read(at(x, row * x_row + token * x_token + head * x_head), x_token, rows, headdim, xs, q, p)
                at_token = (row * seqlen + token) * nheads + head
                total = prepare(
                    at(scale, at_token), at(log_decay, at_token), nheads, rows, tiled, sums, scales, from_start, to_end
                )
                for i in range(tiled):
                    mask_row(at(CB, i * q), sums, scales, i, at(W, i * q))
                if not fresh:
                    multiply(out, p, Cs, n, 1, state, p, tiled, p, d_state, 0)
                    scale_rows(out, from_start, tiled, p, out)
                for i in range(0, tiled, TILE_ROWS):
                    line, depth = at(W, i * q), min(i + TILE_ROWS, tiled)
                    row_of_tiles(at(out, i * p), p, line, q, 1, xs, p, p, depth, 0 if fresh else 1)
                d = at(D, head * headdim)
                for i in range(rows):
                    target = at(y, ((row * seqlen + token + i) * nheads + head) * headdim)
                    own, line = at(xs, i * p), at(out, i * p)
                    for j in range(headdim):
                        store(target, j, line[j] + d[j] * own[j])
                for i in range(tiled):
                    to_end[i] *= scales[i]
                scale_rows(xs, to_end, tiled, p, xs)
                if not fresh:
                    shrink(state, p * n, total)
                multiply(state, p, Bs, 1, n, xs, p, n, p, rows, 0 if fresh else 1)
        for local in range(last - first):
            state = at(states, local * p * n)
            target = at(finals, (sequence * nheads + group * k + first + local) * headdim * d_state)
            for i in range(headdim):
                for j in range(d_state):
                    target[i * d_state + j] = state[j * p + i]


def _forward_float32(b):
    _forward(b, vector.float32(b[14]), vector.float32(b[18]), vector.float32(b[22]), vector.float32(b[26]))


def _forward_bfloat16(b):
    _forward(b, vector.bfloat16(b[14]), vector.bfloat16(b[18]), vector.bfloat16(b[22]), vector.bfloat16(b[26]))


_FORWARD = {torch.float32: Kernel(_forward_float32), torch.bfloat16: Kernel(_forward_bfloat16)}
