"""One token through a Mamba-2 mixer on a CPU in a single launch: weights and state are read once, nothing else counts.

Every worker computes its rows of the first product, then its heads, then its rows of the last product; the workers meet
twice in between. Sums are float32.
"""

import numpy as np
import torch
from torch import Tensor

from dualscan.ops._numba import vector
from dualscan.ops._numba.product import DOT_ROWS, multiply_vectors
from dualscan.ops._numba.vector import ONE, ZERO, Kernel, at, barrier, device_function, load, share
from dualscan.ops.decode import Parameters, Sizes


def step(u: Tensor, conv: Tensor, ssm: Tensor, parameters: Parameters, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in `decode.mamba2_step`."""
    batch, d_model = u.shape
    channels, halo = conv.shape[1:]
    in_weight, in_bias, conv_weight, conv_bias, A_log, dt_bias, D, norm, out_weight, out_bias = parameters
    nheads, headdim, d_state = ssm.shape[1:]
    d_inner, d_projected = nheads * headdim, in_weight.shape[0]
    y = torch.empty(u.shape, dtype=u.dtype)
    conv_after = torch.empty((batch, halo, channels), dtype=conv.dtype)
    ssm_after = torch.empty(ssm.shape, dtype=torch.float32)
    workers = torch.get_num_threads()
    private = batch * max(d_model, d_inner) + 2 * sizes.ngroups * d_state + max(headdim, DOT_ROWS)
    projected = torch.empty(batch * d_projected, dtype=u.dtype)
    scratch = torch.empty(batch * d_inner + workers * private, dtype=torch.float32)
    limits = torch.tensor([*sizes.dt_limit, sizes.norm_eps], dtype=torch.float32)
    _STEP[u.dtype](
        *(u, in_weight, in_bias, conv_weight, conv_bias, out_weight, out_bias, A_log, dt_bias, D, norm),
        *(conv, *conv.stride(), ssm, y, conv_after, ssm_after),
        *(batch, d_model, d_projected, channels, halo, nheads, headdim, sizes.ngroups, d_state),
        *(sizes.norm_groups, sizes.norm_before_gate, limits, projected, scratch, private),
        workers=workers,
        meet=True,
    )
    return y, conv_after.transpose(1, 2), ssm_after


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
def _step(p, u, in_weight, in_bias, conv_weight, conv_bias, out_weight, out_bias, conv, y, conv_after, projected):
    A_log, dt_bias, D, norm = vector.float32(p[9]), vector.float32(p[10]), vector.float32(p[11]), vector.float32(p[12])
    conv_row, conv_channel, conv_time = p[14], p[15], p[16]
    ssm, ssm_after = vector.float32(p[17]), vector.float32(p[20])
    batch, d_model, d_projected, channels, halo = p[21], p[22], p[23], p[24], p[25]
    nheads, headdim, ngroups, d_state, norm_groups, norm_first = p[26], p[27], p[28], p[29], p[30], p[31] != 0
    limits, d_inner, groups = vector.float32(p[32]), nheads * headdim, ngroups * d_state
    low, high, eps = limits[0], limits[1], limits[2]
    begin, end, worker = share(p, d_projected)
    gated = vector.float32(p[34])
    own = at(gated, batch * d_inner + worker * p[35])  # u, then the normalised y
    BC = at(own, batch * max(d_model, d_inner))
    x = at(BC, 2 * groups)
    for i in range(batch * d_model):
        own[i] = load(u, i)
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
                before = at(ssm, ((b * nheads + head) * headdim + i) * d_state)
                now = at(ssm_after, ((b * nheads + head) * headdim + i) * d_state)
                scaled, total = x[i] * size, ZERO
                for j in range(d_state):
                    value = before[j] * decay + scaled * B[j]
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


def _step_float32(p):
    weights = vector.float32(p[2]), vector.float32(p[3]), vector.float32(p[4]), vector.float32(p[5])
    others = vector.float32(p[6]), vector.float32(p[7]), vector.float32(p[8]), vector.float32(p[13])
    _step(p, *weights, *others, vector.float32(p[18]), vector.float32(p[19]), vector.float32(p[33]))


def _step_bfloat16(p):
    weights = vector.bfloat16(p[2]), vector.bfloat16(p[3]), vector.bfloat16(p[4]), vector.bfloat16(p[5])
    others = vector.bfloat16(p[6]), vector.bfloat16(p[7]), vector.bfloat16(p[8]), vector.bfloat16(p[13])
    _step(p, *weights, *others, vector.bfloat16(p[18]), vector.bfloat16(p[19]), vector.bfloat16(p[33]))


_STEP = {torch.float32: Kernel(_step_float32), torch.bfloat16: Kernel(_step_bfloat16)}
