"""The backward kernel: the states at the chunks' starts are rebuilt, then the chunks run in reverse.

With S the state at a chunk's start, G the gradient of the state at its end, P = (dY (s X)^T) o L and F = exp(cs) dY,

dCB = sum over heads of P,                  d(sX) = ((C B^T) o L)^T dY + exp(cs_Q - cs) B G,
dC = dCB B + F S^T,                         dB = dCB^T C + (exp(cs_Q - cs) s X) G^T,
G' = exp(cs_Q) G + C^T F,                   dX = s d(sX) + D dY.

The gradient of the prefix sums is taken from row and column sums of P o C B^T without its diagonal, which does not
decay, and from inner products with the states; never from y dy - x dx, which cancels.
"""

import numpy as np
import torch
from torch import Tensor

from dualscan.ops._numba import vector
from dualscan.ops._numba.launch import adjacent
from dualscan.ops._numba.product import TILE_ROWS, multiply, row_of_tiles
from dualscan.ops._numba.vector import ZERO, Kernel, at, device_function, load, share, store
from dualscan.ops.ssd.blocks import LOWEST_LOG_DECAY
from dualscan.ops.ssd.cpu.forward import lower_product, per_token, skip
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


def backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, scale, log_decay, B, C, D and initial_states; arguments and results as in `chunked.backward`."""
    problem = Problem(x, B, cu_seqlens, chunk_size)
    q, p, n = problem.q, problem.p, problem.n
    x, B, C = adjacent(x), adjacent(B), adjacent(C)
    dy = torch.zeros_like(x) if dy is None else adjacent(dy)
    dx = torch.empty(x.shape, dtype=x.dtype)
    per_head = 2, problem.batch, problem.seqlen, problem.nheads
    dscale, ddecay = torch.empty(per_head, dtype=torch.float32).unbind()
    shared = 2, problem.parts, problem.batch, problem.seqlen, problem.ngroups, problem.d_state
    dB, dC = torch.empty(shared, dtype=torch.float32).unbind()
    dD = torch.zeros(problem.nseq, problem.nheads, problem.headdim, dtype=torch.float32)
    dinitial = None if initial_states is None else torch.empty(initial_states.shape, dtype=torch.float32)
    states = torch.empty(problem.blocks, problem.nheads, p * n, dtype=torch.float32)
    matrices = 5 * q * p + 6 * q * n + 4 * q * q + p * n + problem.together * p * n
    scratch = torch.empty(problem.workers, 2 * (4 * q) + 3 * q + matrices, dtype=torch.float32)
    _BACKWARD[x.dtype](
        *problem.sizes(),
        *(*strides(x), *strides(B), *strides(C), *strides(dy), dx),
        *per_token(scale, log_decay),
        *(skip(D, problem), None if initial_states is None else initial_states.contiguous()),
        *(None if dfinal is None else dfinal.float().contiguous(), dscale, ddecay, dB, dC, dD, dinitial, states),
        *(scratch, scratch.shape[1], problem.items, problem.batch),
        workers=problem.workers,
    )
    dD = dD.sum((0, 2)) if D is not None and D.ndim == 1 else dD.sum(0)
    return (
        dx,
        x.new_empty(0) if scale is None else dscale.to(scale.dtype, copy=True),
        ddecay.masked_fill(log_decay < LOWEST_LOG_DECAY, 0.0).to(log_decay.dtype),
        dB.sum(0).to(B.dtype),
        dC.sum(0).to(C.dtype),
        x.new_empty(0) if D is None else dD.to(D.dtype),
        x.new_empty(0) if dinitial is None or initial_states is None else dinitial.to(initial_states.dtype),
    )


@device_function
def _through_mask(CB, dL, dCB, sums, tiled, q, rows, columns):
    """Row by row: `dL` becomes (C B^T) o L, `dCB` grows by P; `rows` and `columns` become the sums of P o C B^T."""
    for i in range(tiled):
        columns[i] = 0.0
    for i in range(tiled):
        own, total = sums[i], 0.0
        products, values, gradient = at(CB, i * q), at(dL, i * q), at(dCB, i * q)
        for j in range(i):
            mask = decay(own - sums[j])
            share_of = values[j] * mask
            gradient[j] += share_of
            values[j] = mask * products[j]
            pair = np.float64(share_of * products[j])
            total += pair
            columns[j] += pair
        gradient[i] += values[i]
        values[i] = products[i]
        rows[i] = total
        for j in range(i + 1, whole_tiles(i + 1)):
            values[j] = ZERO


@device_function
def _inner(a, b, count):
    total = ZERO
    for i in range(count):
        total += a[i] * b[i]
    return np.float64(total)


@device_function
def _backward(b, x, B, C, dy, dx):
    segments, ngroups, k, together, parts, seqlen = vector.int64(b[2]), b[3], b[4], b[5], b[6], b[7]
    headdim, d_state, chunk, q, p, n = b[8], b[9], b[10], b[11], b[12], b[13]
    x_row, x_token, x_head = b[15], b[16], b[17]
    B_row, B_token, B_group, C_row, C_token, C_group = b[19], b[20], b[21], b[23], b[24], b[25]
    dy_row, dy_token, dy_head = b[27], b[28], b[29]
    scale, log_decay, D = vector.float32(b[31]), vector.float32(b[32]), vector.float32(b[33])
    initial, given, dfinal, carried = vector.float32(b[34]), b[34] != 0, vector.float32(b[35]), b[35] != 0
    dscale, ddecay = vector.float32(b[36]), vector.float32(b[37])
    dB_out, dC_out, dD = vector.float32(b[38]), vector.float32(b[39]), vector.float32(b[40])
    dinitial, saved, batch = vector.float32(b[41]), vector.float32(b[42]), b[46]
    nheads, matrix = ngroups * k, p * n
    begin, end, worker = share(b, b[45])
    base = b[43] + 4 * worker * b[44]
    sums = vector.float64(base)
    dsums, row_sums, column_sums = at(sums, q), at(sums, 2 * q), at(sums, 3 * q)
    scales = at(vector.float32(base), 8 * q)
    from_start, to_end = at(scales, q), at(scales, 2 * q)
    xs = at(scales, 3 * q)
    dys, dxs, xT, decayed = at(xs, q * p), at(xs, 2 * q * p), at(xs, 3 * q * p), at(xs, 4 * q * p)
    Bs = at(xs, 5 * q * p)
    Cs, Bt, dBs, dCs, F = at(Bs, q * n), at(Bs, 2 * q * n), at(Bs, 3 * q * n), at(Bs, 4 * q * n), at(Bs, 5 * q * n)
    CB = at(Bs, 6 * q * n)
    dL, dCB = at(CB, q * q), at(CB, 2 * q * q)
    GT = at(CB, 4 * q * q)
    Gs = at(GT, matrix)
    for item in range(begin, end):
        sequence, part = item // (ngroups * parts), item % parts
        group = item // parts % ngroups
        row, start, length = segments[4 * sequence], segments[4 * sequence + 1], segments[4 * sequence + 2]
        before = segments[4 * sequence + 3]
        first_head = group * k + part * together
        heads = min((part + 1) * together, k) - part * together
        chunks = (length + chunk - 1) // chunk
        # The states at the chunks' starts, (p, n) in memory.
        for local in range(heads):
            state = at(saved, (before * nheads + first_head + local) * matrix)
            if chunks > 0:
                fill(state, matrix, ZERO)
            if given and chunks > 0:
                source = at(initial, (sequence * nheads + first_head + local) * headdim * d_state)
                for i in range(headdim):
                    for j in range(d_state):
                        state[i * n + j] = source[i * d_state + j]
            G = at(Gs, local * matrix)
            fill(G, matrix, ZERO)
            if carried:
                source = at(dfinal, (sequence * nheads + first_head + local) * headdim * d_state)
                for i in range(headdim):
                    for j in range(d_state):
                        G[j * p + i] = source[i * d_state + j]
        for c in range(chunks - 1):
            token = start + c * chunk
            tiled = whole_tiles(chunk)
            read(at(B, row * B_row + token * B_token + group * B_group), B_token, chunk, d_state, Bs, q, n)
            for local in range(heads):
                head = first_head + local
                state = at(saved, ((before + c) * nheads + head) * matrix)
                after = at(state, nheads * matrix)
                read(at(x, row * x_row + token * x_token + head * x_head), x_token, chunk, headdim, xs, q, p)
                at_token = (row * seqlen + token) * nheads + head
                total = prepare(
                    at(scale, at_token), at(log_decay, at_token), nheads, chunk, tiled, sums, scales, from_start, to_end
                )
                for i in range(tiled):
                    to_end[i] *= scales[i]
                scale_rows(xs, to_end, tiled, p, xs)
                for i in range(matrix):
                    after[i] = state[i]
                shrink(after, matrix, total)
                multiply(after, n, xs, 1, p, Bs, n, p, n, chunk, 1)
        for back in range(chunks):
            c = chunks - 1 - back
            token = start + c * chunk
            rows = min(chunk, length - c * chunk)
            tiled = whole_tiles(rows)
            # A state, or the gradient of one, that is known to be zero is not multiplied.
            has_state, has_gradient = c > 0 or given, back > 0 or carried
            read(at(B, row * B_row + token * B_token + group * B_group), B_token, rows, d_state, Bs, q, n)
            read(at(C, row * C_row + token * C_token + group * C_group), C_token, rows, d_state, Cs, q, n)
            transpose(Bs, q, n, Bt)
            lower_product(CB, q, Cs, n, Bt, q, tiled, q, d_state)
            fill(dBs, q * n, ZERO)
            fill(dCs, q * n, ZERO)
            fill(dCB, q * q, ZERO)
            for local in range(heads):
                head = first_head + local
                S, G = at(saved, ((before + c) * nheads + head) * matrix), at(Gs, local * matrix)
                read(at(x, row * x_row + token * x_token + head * x_head), x_token, rows, headdim, xs, q, p)
                read(at(dy, row * dy_row + token * dy_token + head * dy_head), dy_token, rows, headdim, dys, q, p)
                at_token = (row * seqlen + token) * nheads + head
                total = prepare(
                    at(scale, at_token), at(log_decay, at_token), nheads, rows, tiled, sums, scales, from_start, to_end
                )
                scale_rows(xs, scales, tiled, p, xs)
                for i in range(tiled, q):
                    for j in range(p):
                        xs[i * p + j] = ZERO
                transpose(xs, q, p, xT)
                lower_product(dL, q, dys, p, xT, q, tiled, q, headdim)
                _through_mask(CB, dL, dCB, sums, tiled, q, row_sums, column_sums)
                for i in range(tiled):
                    dsums[i] = row_sums[i] - column_sums[i]
                if has_gradient:
                    multiply(dxs, p, Bs, n, 1, G, p, tiled, p, d_state, 0)
                    scale_rows(dxs, to_end, tiled, p, dxs)
                    into_state = 0.0
                    for i in range(tiled):
                        value = _inner(at(xs, i * p), at(dxs, i * p), p)
                        dsums[i] -= value
                        into_state += value
                    transpose(G, n, p, GT)
                    dsums[rows - 1] += into_state + (total * _inner(S, GT, matrix) if has_state else 0.0)
                    scale_rows(xs, to_end, tiled, p, decayed)
                    multiply(dBs, n, decayed, p, 1, GT, n, tiled, n, headdim, 1)
                for j in range(0, tiled, TILE_ROWS):
                    line, mask = at(dxs, j * p), at(dL, j * q + j)
                    row_of_tiles(line, p, mask, 1, q, at(dys, j * p), p, p, tiled - j, 1 if has_gradient else 0)
                scale_rows(dys, from_start, tiled, p, decayed)
                if has_state:
                    multiply(F, n, decayed, p, 1, S, n, tiled, n, headdim, 0)
                    for i in range(tiled):
                        line, out, own = at(F, i * n), at(dCs, i * n), at(Cs, i * n)
                        dsums[i] += _inner(line, own, n)
                        for j in range(n):
                            out[j] += line[j]
                if has_gradient:
                    shrink(G, matrix, total)
                multiply(G, p, Cs, 1, n, decayed, p, n, p, rows, 1 if has_gradient else 0)
                suffix = 0.0
                d, total_dD = at(D, head * headdim), at(dD, (sequence * nheads + head) * headdim)
                for back_row in range(rows):
                    i = rows - 1 - back_row
                    suffix += dsums[i]
                    ddecay[at_token + i * nheads] = np.float32(suffix)
                    source = at(x, row * x_row + (token + i) * x_token + head * x_head)
                    target = at(dx, ((row * seqlen + token + i) * nheads + head) * headdim)
                    line, own_dy, factor = at(dxs, i * p), at(dys, i * p), scales[i]
                    product = ZERO
                    for j in range(headdim):
                        value = load(source, j)
                        product += value * line[j]
                        total_dD[j] += value * own_dy[j]
                        store(target, j, factor * line[j] + d[j] * own_dy[j])
                    dscale[at_token + i * nheads] = product
            multiply(dBs, n, dCB, 1, q, Cs, n, tiled, n, tiled, 1)
            multiply(dCs, n, dCB, q, 1, Bs, n, tiled, n, tiled, 1)
            for i in range(rows):
                target = (((part * batch + row) * seqlen + token + i) * ngroups + group) * d_state
                for j in range(d_state):
                    dB_out[target + j] = dBs[i * n + j]
                    dC_out[target + j] = dCs[i * n + j]
        if given:
            for local in range(heads):
                G = at(Gs, local * matrix)
                target = at(dinitial, (sequence * nheads + first_head + local) * headdim * d_state)
                for i in range(headdim):
                    for j in range(d_state):
                        target[i * d_state + j] = G[j * p + i]


def _backward_float32(b):
    inputs = vector.float32(b[14]), vector.float32(b[18]), vector.float32(b[22])
    _backward(b, *inputs, vector.float32(b[26]), vector.float32(b[30]))


def _backward_bfloat16(b):
    inputs = vector.bfloat16(b[14]), vector.bfloat16(b[18]), vector.bfloat16(b[22])
    _backward(b, *inputs, vector.bfloat16(b[26]), vector.bfloat16(b[30]))


_BACKWARD = {torch.float32: Kernel(_backward_float32), torch.bfloat16: Kernel(_backward_bfloat16)}
