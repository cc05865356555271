"""One token of the selective scan on a GPU: the state is read once and the next one written once, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualscan.ops import _triton
from dualscan.ops._launch import Launcher
from dualscan.ops.selective_scan.configs import STEP
from dualscan.ops.ssd.triton_scan import step_size
from dualscan.ops.triton_common import LOG2E, sigmoid

_SIZES = ["x_b", "dt_b", "z_b", "b_b", "b_g", "c_b", "c_g", "channels", "ngroups", "n_states"]


@triton.jit(do_not_specialize=_SIZES)
def step_kernel(
    state, x, dt, z, A, B, C, D, bias, y, after,
    x_b: tl.int64, dt_b: tl.int64, z_b: tl.int64, b_b: tl.int64, b_g: tl.int64, c_b: tl.int64, c_g: tl.int64,
    channels: tl.int32, ngroups: tl.int32, n_states: tl.int32,
    BLOCK: tl.constexpr, STATES: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Grid `blocks of channels x batch`, in this order."""
    blocks = tl.cdiv(channels, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    inside = c < channels
    group = c // (channels // ngroups)
    both = inside[:, None] & (n < n_states)[None, :]
    shift = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    delta, _ = step_size(
        tl.load(dt + row * dt_b + c, mask=inside, other=0.0).to(tl.float32), shift, 0.0, 0.0, SOFTPLUS, False
    )
    value = tl.load(x + row * x_b + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(B + row * b_b + group[:, None] * b_g + n[None, :], mask=both, other=0.0).to(tl.float32)
    r = tl.load(C + row * c_b + group[:, None] * c_g + n[None, :], mask=both, other=0.0).to(tl.float32)
    rate = tl.load(A + c[:, None] * n_states + n[None, :], mask=both, other=0.0).to(tl.float32) * LOG2E
    place = (row * channels + c)[:, None] * n_states + n[None, :]
    h = tl.load(state + place, mask=both, other=0.0).to(tl.float32)
    h = tl.exp2(delta[:, None] * rate) * h + (delta * value)[:, None] * b
    tl.store(after + place, h, mask=both)
    out = tl.sum(h * r, 1)
    if HAS_D:
        out += tl.load(D + c, mask=inside, other=0.0).to(tl.float32) * value
    if HAS_Z:
        gate = tl.load(z + row * z_b + c, mask=inside, other=0.0).to(tl.float32)
        out *= gate * sigmoid(gate)
    tl.store(y + row * channels + c, out.to(y.dtype.element_ty), mask=inside)


_step = Launcher(step_kernel)


def step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """`y` (b, d) and the next state (b, d, n); arguments as in `reference.step`."""
    state, A = state.contiguous(), A.contiguous()
    x, dt, B, C = (_triton.rows_last(t) for t in (x, dt, B, C))
    z = None if z is None else _triton.rows_last(z)
    (batch, channels), ngroups, d_state = x.shape, B.shape[1], A.shape[1]
    y, after = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(state)
    if x.numel():
        with _triton.on_device(x):
            _step(
                (_triton.cdiv(channels, STEP.channels) * batch, 1, 1),
                (state, x, dt, z, A, B, C, D, dt_bias, y, after),
                (*(x.stride(0), dt.stride(0), 0 if z is None else z.stride(0)),
                 *(*B.stride()[:2], *C.stride()[:2], channels, ngroups, d_state)),
                (STEP.channels, triton.next_power_of_2(d_state), dt_softplus,
                 *(z is not None, D is not None, dt_bias is not None)),
                STEP.warps,
            )  # fmt: skip
    return y, after
