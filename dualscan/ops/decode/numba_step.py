"""Decoding on a CPU: one token through Mamba-2 layers in a single launch, and a product with few vectors.

In each layer every worker computes its rows of the first product, then its heads, then its rows of the last product;
the workers meet in between. Sums are float32.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dualscan.ops._numba import vector
from dualscan.ops._numba.launch import workers_for
from dualscan.ops._numba.product import DOT_ROWS, multiply_vectors
from dualscan.ops._numba.vector import ZERO, Kernel, at, barrier, device_function, like, load, share, store
from dualscan.ops.decode import MOST_ROWS, Parameters, Sizes, State

# What the kernel finds of a layer in the table of its plan: the addresses of `Parameters`, then those of the states,
# old and new, and the old convolution state's strides.
_PARAMETERS = len(Parameters._fields)
_FIELDS = _PARAMETERS + 7


Table = ctypes.Array[ctypes.c_int64]


class Plan:
    """Layers of one shape that a token goes through one after the other; see `decode.plan`."""

    def __init__(self, layers: Sequence[Parameters], sizes: Sizes):
        first = layers[0]
        self.dtype, self.count = first.in_weight.dtype, len(layers)
        self.d_projected, self.d_model = first.in_weight.shape
        self.channels, self.halo = first.conv_weight.shape[0], first.conv_weight.shape[-1] - 1
        self.nheads, self.d_inner = first.A_log.shape[0], first.norm_weight.shape[0]
        self.headdim = self.d_inner // self.nheads
        self.d_state = (self.channels - self.d_inner) // (2 * sizes.ngroups)
        self.sizes = sizes
        self.constants = torch.tensor([*sizes.dt_limit, sizes.norm_eps, sizes.before_eps], dtype=torch.float32)
        self.table = (ctypes.c_int64 * (_FIELDS * self.count))()
        for i, layer in enumerate(layers):
            addresses = [0 if t is None else t.data_ptr() for t in layer]
            self.table[i * _FIELDS : i * _FIELDS + _PARAMETERS] = addresses

    def step(
        self, u: Tensor, states: Sequence[State], *, reuse_state: bool = False
    ) -> tuple[Tensor, list[State]] | None:
        """One token through the layers, all in one launch.

        Args:
            u: `(batch, d_model)`.
            states: one a layer.
            reuse_state: writes the next states over the given ones, which saves a third of the state's traffic.

        Returns:
            The last layer's output, float32 like u's shape, and the next states; the given ones are not modified,
            unless `reuse_state`. None for more rows than the kernel is good for, or for states that do not fit.
        """
        batch = u.shape[0]
        if batch > MOST_ROWS or not all(self._takes(batch, *state) for state in states):
            return None
        if any(ssm.dtype != states[0][1].dtype for _, ssm in states):
            return None
        table, after = self.prepare(states, reuse_state)
        return self.run(u, table, states[0][1].dtype), after

    def _takes(self, batch: int, conv: Tensor, ssm: Tensor) -> bool:
        return (
            conv.shape == (batch, self.channels, self.halo)
            and ssm.shape == (batch, self.nheads, self.headdim, self.d_state)
            and conv.dtype == self.dtype
            and ssm.dtype in (torch.float32, torch.bfloat16)
            and ssm.is_contiguous()
        )

    def prepare(self, states: Sequence[State], reuse_state: bool) -> tuple[Table, list[State]]:
        """A launch's table, and the states that the launch leaves: new ones, or with `reuse_state` the given.

        With the states of a launch that reused them, the table is good for every launch after it.
        """
        table = type(self.table).from_buffer_copy(self.table)
        time_major = (self.halo * self.channels, 1, self.channels)
        after = []
        for i, (conv, ssm) in enumerate(states):
            strides = conv.stride()
            conv_after, ssm_after = conv, ssm
            if not reuse_state or strides != time_major:
                conv_after = torch.empty_strided(conv.shape, time_major, dtype=conv.dtype)
            if not reuse_state:
                ssm_after = torch.empty_like(ssm)
            addresses = conv.data_ptr(), conv_after.data_ptr(), ssm.data_ptr(), ssm_after.data_ptr()
            table[i * _FIELDS + _PARAMETERS : (i + 1) * _FIELDS] = (*addresses, *strides)
            after.append((conv_after, ssm_after))
        return table, after

    def run(self, u: Tensor, table: Table, state_dtype: torch.dtype) -> Tensor:
        """One launch with SSM states of one dtype: the output of the last layer, `(batch, d_model)` float32."""
        u, sizes = u.float().contiguous(), self.sizes
        batch = u.shape[0]
        workers = torch.get_num_threads()
        private = batch * max(self.d_model, self.d_inner) + 2 * sizes.ngroups * self.d_state
        private += max(self.headdim, DOT_ROWS)
        y = torch.empty(u.shape, dtype=torch.float32)
        projected = torch.empty(batch * self.d_projected, dtype=self.dtype)
        scratch = torch.empty(batch * (self.d_inner + self.d_model) + workers * private, dtype=torch.float32)
        _STEP[self.dtype, state_dtype](
            *(u, y, ctypes.addressof(table), self.count, batch, self.d_model, self.d_projected, self.channels),
            *(self.halo, self.nheads, self.headdim, sizes.ngroups, self.d_state, sizes.norm_groups),
            *(sizes.norm_before_gate, self.constants, projected, scratch, private),
            workers=workers,
            meet=True,
        )
        return y


def project(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, eps: float) -> Tensor:
    """Arguments and results as in `decode.project`."""
    (rows, depth), width = x.shape, weight.shape[0]
    y = torch.empty((rows, width), dtype=weight.dtype)
    workers = workers_for(weight.numel())
    scratch = torch.empty((workers, rows * depth + DOT_ROWS), dtype=torch.float32)
    eps_and_norm = (None, None) if norm is None else (torch.tensor(eps, dtype=torch.float32), norm)
    _PROJECT[y.dtype](x, weight, bias, y, rows, depth, width, scratch, *eps_and_norm, workers=workers)
    return y


@device_function
def _normalise(value, size, weight, eps, out):
    """`out` = RMSNorm of `size` values under `weight`."""
    inverse = vector.inverse_rms(value, size, eps)
    for i in range(size):
        out[i] = value[i] * inverse * weight[i]


@device_function
def _project(p, x, weight, bias, y):
    rows, depth, width = p[6], p[7], p[8]
    begin, end, worker = share(p, width)
    own = at(vector.float32(p[9]), worker * (rows * depth + DOT_ROWS))
    if p[11] != 0:
        wide, eps, norm = vector.float32(p[2]), vector.float32(p[10])[0], vector.float32(p[11])
        for row in range(0, rows * depth, depth):
            _normalise(at(wide, row), depth, norm, eps, at(own, row))
    else:
        for i in range(rows * depth):
            own[i] = load(x, i)
    multiply_vectors(weight, bias, p[4] != 0, own, depth, rows, depth, begin, end, y, width, at(own, rows * depth))


@device_function
def _softplus(x):
    return x if x > np.float32(20) else np.float32(np.log1p(np.exp(np.float64(x))))


@device_function
def _convolve(conv, conv_channel, conv_time, new, weight, bias, has_bias, halo, begin, count, out):
    """`out[:count]` = SiLU of the convolution of `count` channels from `begin`."""
    width = halo + 1
    for i in range(count):
        c = begin + i
        total = load(weight, c * width + halo) * load(new, c)
        if has_bias:
            total += load(bias, c)
        for j in range(halo):
            total += load(weight, c * width + j) * load(conv, c * conv_channel + j * conv_time)
        out[i] = total
    for i in range(count):
        out[i] = vector.silu(out[i])


@device_function
def _move_on(conv, conv_channel, conv_time, new, halo, channels, begin, count, after):
    """The convolution's state of some channels after the token `new`; `after` may be `conv` itself."""
    for j in range(halo - 1):
        for i in range(count):
            after[j * channels + begin + i] = conv[(begin + i) * conv_channel + (j + 1) * conv_time]
    if halo > 0:
        for i in range(count):
            after[(halo - 1) * channels + begin + i] = new[begin + i]


@device_function
def _advance(old, now, in_place, rows, d_state, decay, size, x, B, C, D, y):
    """One head: state = decay state + (size x) B^T, y = state C + D x."""
    for i in range(rows):
        scaled, total, line, target = x[i] * size, ZERO, at(old, i * d_state), at(now, i * d_state)
        if in_place:  # the compiler must see one pointer, else it takes care that two may overlap
            for j in range(d_state):
                value = load(target, j) * decay + scaled * B[j]
                store(target, j, value)
                total += value * C[j]
        else:
            for j in range(d_state):
                value = load(line, j) * decay + scaled * B[j]
                store(target, j, value)
                total += value * C[j]
        y[i] = total + D * x[i]


@device_function
def _layer(p, q, u, y, projected, state_like):
    """`y` = the mixer's output for `u`; with a norm before the mixer, y = u + mixer(norm(u)), and y may be u."""
    batch, d_model, d_projected, channels, halo = p[6], p[7], p[8], p[9], p[10]
    nheads, headdim, ngroups, d_state, norm_groups, norm_first = p[11], p[12], p[13], p[14], p[15], p[16] != 0
    d_inner, groups, constants = nheads * headdim, ngroups * d_state, vector.float32(p[17])
    low, high, eps, eps_before = constants[0], constants[1], constants[2], constants[3]
    gated = vector.float32(p[19])
    mixed = at(gated, batch * d_inner)
    first, last, worker = share(p, nheads)
    own = at(mixed, batch * d_model + worker * p[20])  # u, then the normalised y
    BC = at(own, batch * max(d_model, d_inner))
    x = at(BC, 2 * groups)

    in_weight, conv_weight, conv_bias, out_weight = like(projected, q[0]), like(projected, q[2]), q[3], q[8]
    conv, conv_after, ssm, ssm_after = like(projected, q[11]), like(projected, q[12]), q[13], q[14]
    A_log, dt_bias, D = vector.float32(q[4]), vector.float32(q[5]), vector.float32(q[6])
    residual = q[10] != 0
    for b in range(batch):
        line, target = at(u, b * d_model), at(own, b * d_model)
        if residual:
            _normalise(line, d_model, vector.float32(q[10]), eps_before, target)
        else:
            for i in range(d_model):
                target[i] = line[i]
    begin, end, _ = share(p, d_projected)
    in_bias = like(projected, q[1])
    multiply_vectors(
        in_weight, in_bias, q[1] != 0, own, d_model, batch, d_model, begin, end, projected, d_projected, x
    )  # fmt: skip
    barrier()
    for b in range(batch):
        z = at(projected, b * d_projected)
        new, dt = at(z, d_inner), at(z, d_inner + channels)
        state, after = at(conv, b * q[15]), at(conv_after, b * halo * channels)
        bias, has_bias = like(projected, conv_bias), conv_bias != 0
        _convolve(state, q[16], q[17], new, conv_weight, bias, has_bias, halo, d_inner, 2 * groups, BC)
        for head in range(first, last):
            begin = head * headdim
            _convolve(state, q[16], q[17], new, conv_weight, bias, has_bias, halo, begin, headdim, x)
            _move_on(state, q[16], q[17], new, halo, channels, begin, headdim, after)
            size = min(max(_softplus(load(dt, head) + dt_bias[head]), low), high)
            decay = np.float32(np.exp(-np.exp(np.float64(A_log[head])) * np.float64(size)))
            B = at(BC, head // (nheads // ngroups) * d_state)
            place, out = (b * nheads + head) * headdim * d_state, at(gated, b * d_inner + begin)
            old, now = at(like(state_like, ssm), place), at(like(state_like, ssm_after), place)
            _advance(old, now, ssm == ssm_after, headdim, d_state, decay, size, x, B, at(B, groups), D[head], out)
            if not norm_first:
                for i in range(headdim):
                    out[i] *= vector.silu(load(z, begin + i))
    barrier()
    if worker == 0:  # now that all have read the columns of B and C
        for b in range(batch):
            state, after = at(conv, b * q[15]), at(conv_after, b * halo * channels)
            new = at(projected, b * d_projected + d_inner)
            _move_on(state, q[16], q[17], new, halo, channels, d_inner, 2 * groups, after)
    size = d_inner // norm_groups
    for b in range(batch):
        z = at(projected, b * d_projected)
        for start in range(0, d_inner, size):
            target = at(own, b * d_inner + start)
            _normalise(at(gated, b * d_inner + start), size, at(vector.float32(q[7]), start), eps, target)
            if norm_first:
                for i in range(size):
                    target[i] *= vector.silu(load(z, start + i))
    begin, end, _ = share(p, d_model)
    out_bias = like(projected, q[9])
    multiply_vectors(
        like(projected, out_weight), out_bias, q[9] != 0, own, d_inner, batch, d_inner, begin, end, mixed, d_model, x
    )
    for b in range(batch):
        for i in range(begin, end):
            k = b * d_model + i
            y[k] = mixed[k] + u[k] if residual else mixed[k]


@device_function
def _step(p, projected, state_like):
    u, y, table = vector.float32(p[2]), vector.float32(p[3]), vector.int64(p[4])
    for i in range(p[5]):
        if i > 0:
            barrier()
        _layer(p, at(table, i * _FIELDS), y if i > 0 else u, y, projected, state_like)


def _project_float32(p):
    _project(p, vector.float32(p[2]), vector.float32(p[3]), vector.float32(p[4]), vector.float32(p[5]))


def _project_bfloat16(p):
    _project(p, vector.bfloat16(p[2]), vector.bfloat16(p[3]), vector.bfloat16(p[4]), vector.bfloat16(p[5]))


def _step_float32(p):
    _step(p, vector.float32(p[18]), vector.float32(p[18]))


def _step_bfloat16(p):
    _step(p, vector.bfloat16(p[18]), vector.float32(p[18]))


def _step_float32_short(p):
    _step(p, vector.float32(p[18]), vector.bfloat16(p[18]))


def _step_bfloat16_short(p):
    _step(p, vector.bfloat16(p[18]), vector.bfloat16(p[18]))


# By the dtypes of the matrices and of the states.
_STEP = {
    (torch.float32, torch.float32): Kernel(_step_float32),
    (torch.bfloat16, torch.float32): Kernel(_step_bfloat16),
    (torch.float32, torch.bfloat16): Kernel(_step_float32_short),
    (torch.bfloat16, torch.bfloat16): Kernel(_step_bfloat16_short),
}
_PROJECT = {torch.float32: Kernel(_project_float32), torch.bfloat16: Kernel(_project_bfloat16)}
