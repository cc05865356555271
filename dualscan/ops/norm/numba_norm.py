"""The norms on a CPU, a row at a time in the first-level cache; the formulas are those of `chunked.py`."""

import numpy as np
import torch
from torch import Tensor

from dualscan.ops._numba import vector
from dualscan.ops._numba.launch import adjacent, workers_for
from dualscan.ops._numba.vector import ONE, ZERO, Kernel, at, device_function, load, share, store

# What a worker keeps of a group: u (then n), the gate, h, and the gate's slope.
SCRATCH = 4


def forward(x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, norm_before_gate: bool, eps: float) -> Tensor:
    """Arguments and result as in `reference.rms_norm_reference`."""
    y = torch.empty(x.shape, dtype=x.dtype)
    rows, gates = _rows(x), None if z is None else _rows(z)
    weight, workers = weight.float().contiguous(), workers_for(x.numel())
    _FORWARD[x.dtype](
        *(rows, rows.stride(0), gates, 0 if gates is None else gates.stride(0), y, weight),
        *(
            torch.empty(workers, SCRATCH, group_size, dtype=torch.float32),
            len(rows),
            x.shape[-1] // group_size,
            group_size,
        ),
        *(norm_before_gate, torch.tensor(eps, dtype=torch.float32)),
        workers=workers,
    )
    return y


def backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, norm_before_gate: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`dx, dz, dweight` in their tensors' dtypes; `dz` has no elements without a gate."""
    dx = torch.empty(x.shape, dtype=x.dtype)
    dz = x.new_empty(0) if z is None else torch.empty(z.shape, dtype=z.dtype)
    rows, grads, gates = _rows(x), _rows(dy), None if z is None else _rows(z)
    wide, workers = weight.float().contiguous(), workers_for(x.numel())
    sums = torch.zeros(workers, x.shape[-1], dtype=torch.float32)
    _BACKWARD[x.dtype](
        *(rows, rows.stride(0), gates, 0 if gates is None else gates.stride(0), grads, grads.stride(0), dx, dz),
        *(
            wide,
            sums,
            torch.empty(workers, SCRATCH, group_size, dtype=torch.float32),
            len(rows),
            x.shape[-1] // group_size,
            group_size,
        ),
        *(norm_before_gate, torch.tensor(eps, dtype=torch.float32)),
        workers=workers,
    )
    return dx, dz, sums.sum(0).to(weight.dtype)


def _rows(x: Tensor) -> Tensor:
    """`(rows, d)` with adjacent columns: a view wherever the rows are evenly spaced."""
    return adjacent(x.reshape(-1, x.shape[-1]))


@device_function
def _forward(p, x, z, y):
    x_row, z_row, weight, rows, groups, size = p[3], p[5], vector.float32(p[7]), p[9], p[10], p[11]
    gated, norm_first, eps = p[4] != 0, p[12], vector.float32(p[13])[0]
    begin, end, worker = share(p, rows)
    u = at(vector.float32(p[8]), worker * SCRATCH * size)
    gate = at(u, size)
    for row in range(begin, end):
        for group in range(groups):
            start = group * size
            own, w, out = at(x, row * x_row + start), at(weight, start), at(y, row * groups * size + start)
            if gated:
                own_gate = at(z, row * z_row + start)
                for c in range(size):
                    gate[c] = vector.silu(load(own_gate, c))
            if gated and not norm_first:
                for c in range(size):
                    u[c] = load(own, c) * gate[c]
            else:
                for c in range(size):
                    u[c] = load(own, c)
            inverse = vector.inverse_rms(u, size, eps)
            if gated and norm_first:
                for c in range(size):
                    store(out, c, u[c] * inverse * w[c] * gate[c])
            else:
                for c in range(size):
                    store(out, c, u[c] * inverse * w[c])


@device_function
def _backward(p, x, z, dy, dx, dz):
    x_row, z_row, dy_row, weight = p[3], p[5], p[7], vector.float32(p[10])
    rows, groups, size = p[13], p[14], p[15]
    gated, norm_first, eps = p[4] != 0, p[16], vector.float32(p[17])[0]
    begin, end, worker = share(p, rows)
    sums = at(vector.float32(p[11]), worker * groups * size)
    n = at(vector.float32(p[12]), worker * SCRATCH * size)
    gate, h, slope = at(n, size), at(n, 2 * size), at(n, 3 * size)
    for row in range(begin, end):
        for group in range(groups):
            start, offset = group * size, row * groups * size + group * size
            own, grad = at(x, row * x_row + start), at(dy, row * dy_row + start)
            w, total = at(weight, start), at(sums, start)
            own_dx, own_dz = at(dx, offset), at(dz, offset)
            if gated:
                own_gate = at(z, row * z_row + start)
                for c in range(size):
                    v = load(own_gate, c)
                    s = vector.sigmoid(v)
                    gate[c] = v * s
                    slope[c] = s + v * s * (ONE - s)
            if gated and not norm_first:
                for c in range(size):
                    n[c] = load(own, c) * gate[c]
            else:
                for c in range(size):
                    n[c] = load(own, c)
            inverse = vector.inverse_rms(n, size, eps)
            if gated and norm_first:
                for c in range(size):
                    n[c] *= inverse
                    g = load(grad, c)
                    store(own_dz, c, g * n[c] * w[c] * slope[c])
                    h[c] = g * gate[c]
            else:
                for c in range(size):
                    n[c] *= inverse
                    h[c] = load(grad, c)
            mean = ZERO
            for c in range(size):
                total[c] += h[c] * n[c]
                h[c] *= w[c]
                mean += h[c] * n[c]
            mean /= np.float32(size)
            if gated and not norm_first:
                for c in range(size):
                    du = inverse * (h[c] - n[c] * mean)
                    store(own_dz, c, du * load(own, c) * slope[c])
                    store(own_dx, c, du * gate[c])
            else:
                for c in range(size):
                    store(own_dx, c, inverse * (h[c] - n[c] * mean))


def _forward_float32(p):
    _forward(p, vector.float32(p[2]), vector.float32(p[4]), vector.float32(p[6]))


def _forward_bfloat16(p):
    _forward(p, vector.bfloat16(p[2]), vector.bfloat16(p[4]), vector.bfloat16(p[6]))


def _backward_float32(p):
    inputs = vector.float32(p[2]), vector.float32(p[4]), vector.float32(p[6])
    _backward(p, *inputs, vector.float32(p[8]), vector.float32(p[9]))


def _backward_bfloat16(p):
    inputs = vector.bfloat16(p[2]), vector.bfloat16(p[4]), vector.bfloat16(p[6])
    _backward(p, *inputs, vector.bfloat16(p[8]), vector.bfloat16(p[9]))


_FORWARD = {torch.float32: Kernel(_forward_float32), torch.bfloat16: Kernel(_forward_bfloat16)}
_BACKWARD = {torch.float32: Kernel(_backward_float32), torch.bfloat16: Kernel(_backward_bfloat16)}
