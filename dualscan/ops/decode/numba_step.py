"""Decoding on a CPU: one token through a Mamba-2 mixer in a single launch, and a product with few vectors.

Every worker computes its rows of the first product, then its heads, then its rows of the last product; the workers meet
twice in between. Sums are float32.
"""

import numpy as np
import torch
from torch import Tensor

from dualscan.ops._numba import vector
from dualscan.ops._numba.launch import workers_for
from dualscan.ops._numba.product import DOT_ROWS, multiply_vectors
from dualscan.ops._numba.vector import ONE, ZERO, Kernel, at, barrier, device_function, load, share
from dualscan.ops.decode import Parameters, Sizes


def step(
    u: Tensor,
    conv: Tensor,
    ssm: Tensor,
    parameters: Parameters,
    sizes: Sizes,
    norm: tuple[Tensor, float] | None,
    reuse_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in `decode.mamba2_step`."""
    batch, d_model = u.shape
    channels, halo = conv.shape[1:]
    in_weight, in_bias, conv_weight, conv_bias, A_log, dt_bias, D, norm_weight, out_weight, out_bias = parameters
    nheads, headdim, d_state = ssm.shape[1:]
    d_inner, d_projected = nheads * headdim, in_weight.shape[0]
    y = torch.empty(u.shape, dtype=torch.float32)
    before, before_eps = (None, 0.0) if norm is None else norm
    conv_after = torch.empty((batch, halo, channels), dtype=conv.dtype)
    ssm_after = ssm if reuse_state else torch.empty(ssm.shape, dtype=torch.float32)
    workers = torch.get_num_threads()
    private = batch * max(d_model, d_inner) + 2 * sizes.ngroups * d_state + max(headdim, DOT_ROWS)
    projected = torch.empty(batch * d_projected, dtype=conv.dtype)
    scratch = torch.empty(batch * d_inner + workers * private, dtype=torch.float32)
    constants = torch.tensor([*sizes.dt_limit, sizes.norm_eps, before_eps], dtype=torch.float32)
    _STEP[conv.dtype](
        *(u, in_weight, in_bias, conv_weight, conv_bias, out_weight, out_bias, A_log, dt_bias, D, norm_weight),
        *(conv, *conv.stride(), ssm, y, conv_after, ssm_after),
        *(batch, d_model, d_projected, channels, halo, nheads, headdim, sizes.ngroups, d_state),
        *(sizes.norm_groups, sizes.norm_before_gate, constants, projected, scratch, private, before),
        workers=workers,
        meet=True,
    )
    return y, conv_after.transpose(1, 2), ssm_after


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Arguments and results as in `decode.project`."""
    (rows, depth), width = x.shape, weight.shape[0]
    y = torch.empty((rows, width), dtype=x.dtype)
    workers = workers_for(weight.numel())
    scratch = torch.empty((workers, rows * depth + DOT_ROWS), dtype=torch.float32)
    _PROJECT[x.dtype](x, weight, bias, y, rows, depth, width, scratch, workers=workers)
    return y


@device_function
def _project(p, x, weight, bias, y):
    rows, depth, width = p[6], p[7], p[8]
    begin, end, worker = share(p, width)
    own = at(vector.float32(p[9]), worker * (rows * depth + DOT_ROWS))
    for i in range(rows * depth):
        own[i] = load(x, i)
    multiply_vectors(weight, bias, p[4] != 0, own, depth, rows, depth, begin, end, y, width, at(own, rows * depth))


@device_function
def _softplus(x):
    return x if x > np.float32(20) else np.float32(np.log1p(np.exp(np.float64(x))))


@device_function
def _convolve(
    conv, conv_channel, conv_time, new, weight, bias, has_bias, halo, begin, count, after, channels, keep, out
):
    """`out[:count]` = SiLU of the convolution of `count` channels from `begin`; with `keep` the state moves on."""
    width = halo + 1
    for i in range(count):
        c = begin + i
        total = load(weight, c * width + halo) * load(new, c)
        if has_bias:
            total += load(bias, c)
        for j in range(halo):
            total += load(weight, c * width + j) * load(conv, c * conv_channel + j * conv_time)
        out[i] = vector.silu(total)
    if keep and halo > 0:
        for i in range(count):
            after[(halo - 1) * channels + begin + i] = new[begin + i]
        for j in range(halo - 1):
            for i in range(count):
                after[j * channels + begin + i] = conv[(begin + i) * conv_channel + (j + 1) * conv_time]


@device_function
def _step(p, in_weight, in_bias, conv_weight, conv_bias, out_weight, out_bias, conv, conv_after, projected):
    A_log, dt_bias, D, norm = vector.float32(p[9]), vector.float32(p[10]), vector.float32(p[11]), vector.float32(p[12])
    conv_row, conv_channel, conv_time = p[14], p[15], p[16]
    ssm, ssm_after = vector.float32(p[17]), vector.float32(p[20])
    in_place = p[17] == p[20]
    batch, d_model, d_projected, channels, halo = p[21], p[22], p[23], p[24], p[25]
    nheads, headdim, ngroups, d_state, norm_groups, norm_first = p[26], p[27], p[28], p[29], p[30], p[31] != 0
    constants, d_inner, groups = vector.float32(p[32]), nheads * headdim, ngroups * d_state
    low, high, eps, eps_before = constants[0], constants[1], constants[2], constants[3]
    u, y, before, normed = vector.float32(p[2]), vector.float32(p[18]), vector.float32(p[36]), p[36] != 0
    begin, end, worker = share(p, d_projected)
    gated = vector.float32(p[34])
    own = at(gated, batch * d_inner + worker * p[35])  # u, then the normalised y
    BC = at(own, batch * max(d_model, d_inner))
    x = at(BC, 2 * groups)
    for b in range(batch):
        line, target, total = at(u, b * d_model), at(own, b * d_model), ZERO
        for i in range(d_model):
            target[i] = line[i]
            total += line[i] * line[i]
        if normed:
            inverse = ONE / np.sqrt(total / np.float32(d_model) + eps_before)
            for i in range(d_model):
                target[i] *= inverse * before[i]
    multiply_vectors(in_weight, in_bias, p[4] != 0, own, d_model, batch, d_model, begin, end, projected, d_projected, x)
    barrier()
    first, last, _ = share(p, nheads)
    for b in range(batch):
        z = at(projected, b * d_projected)
        new, dt = at(z, d_inner), at(z, d_inner + channels)
        state, after = at(conv, b * conv_row), at(conv_after, b * halo * channels)
        _convolve(
            state, conv_channel, conv_time, new, conv_weight, conv_bias, p[6] != 0, halo, d_inner, 2 * groups,
            after, channels, worker == 0, BC,
        )  # fmt: skip
        for head in range(first, last):
            _convolve(
                state, conv_channel, conv_time, new, conv_weight, conv_bias, p[6] != 0, halo, head * headdim, headdim,
                after, channels, True, x,
            )  # fmt: skip
            size = min(max(_softplus(load(dt, head) + dt_bias[head]), low), high)
            decay = np.float32(np.exp(-np.exp(np.float64(A_log[head])) * np.float64(size)))
            B = at(BC, head // (nheads // ngroups) * d_state)
            C = at(B, groups)
            for i in range(headdim):
                old = at(ssm, ((b * nheads + head) * headdim + i) * d_state)
                now = at(ssm_after, ((b * nheads + head) * headdim + i) * d_state)
                scaled, total = x[i] * size, ZERO
                if in_place:  # the compiler must see one pointer, else it takes care that two may overlap
                    for j in range(d_state):
                        value = now[j] * decay + scaled * B[j]
                        now[j] = value
                        total += value * C[j]
                else:
                    for j in range(d_state):
                        value = old[j] * decay + scaled * B[j]
                        now[j] = value
                        total += value * C[j]
                total += D[head] * x[i]
                place = head * headdim + i
                gated[b * d_inner + place] = total if norm_first else total * vector.silu(load(z, place))
    barrier()
    size = d_inner // norm_groups
    for b in range(batch):
        z, target = at(projected, b * d_projected), at(own, b * d_inner)
        for group in range(norm_groups):
            value, total = at(gated, b * d_inner + group * size), ZERO
            for i in range(size):
                total += value[i] * value[i]
            inverse = ONE / np.sqrt(total / np.float32(size) + eps)
            for i in range(size):
                c = group * size + i
                target[c] = value[i] * inverse * norm[c]
                if norm_first:
                    target[c] *= vector.silu(load(z, c))
    begin, end, _ = share(p, d_model)
    multiply_vectors(out_weight, out_bias, p[8] != 0, own, d_inner, batch, d_inner, begin, end, y, d_model, x)
    if normed:
        for b in range(batch):
            for i in range(begin, end):
                y[b * d_model + i] += u[b * d_model + i]


def _project_float32(p):
    _project(p, vector.float32(p[2]), vector.float32(p[3]), vector.float32(p[4]), vector.float32(p[5]))


def _project_bfloat16(p):
    _project(p, vector.bfloat16(p[2]), vector.bfloat16(p[3]), vector.bfloat16(p[4]), vector.bfloat16(p[5]))


def _step_float32(p):
    weights = vector.float32(p[3]), vector.float32(p[4]), vector.float32(p[5]), vector.float32(p[6])
    others = vector.float32(p[7]), vector.float32(p[8]), vector.float32(p[13]), vector.float32(p[19])
    _step(p, *weights, *others, vector.float32(p[33]))


def _step_bfloat16(p):
    weights = vector.bfloat16(p[3]), vector.bfloat16(p[4]), vector.bfloat16(p[5]), vector.bfloat16(p[6])
    others = vector.bfloat16(p[7]), vector.bfloat16(p[8]), vector.bfloat16(p[13]), vector.bfloat16(p[19])
    _step(p, *weights, *others, vector.bfloat16(p[33]))


_STEP = {torch.float32: Kernel(_step_float32), torch.bfloat16: Kernel(_step_bfloat16)}
_PROJECT = {torch.float32: Kernel(_project_float32), torch.bfloat16: Kernel(_project_bfloat16)}
