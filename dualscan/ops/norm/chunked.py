"""The portable fast path: the norms in cache-sized blocks of rows, forward and backward.

With `u` what is normalised, `r = 1 / sqrt(mean(u^2) + eps)` and `n = u r`, the gradient of `n * weight` with respect to
`u` is `r (h - n mean(h n))`, where `h = dy * weight` and means are over a group. Gate and statistics are computed again
in the backward; nothing but the inputs is kept.
"""

import torch
from torch import Tensor

from dualscan.ops._pointwise import accumulation_dtype, block_length, silu, silu_slope_


def forward(x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, norm_before_gate: bool, eps: float) -> Tensor:
    """Arguments and result as in `reference.rms_norm_reference`."""
    dtype, d = accumulation_dtype(x.dtype), x.shape[-1]
    weight = weight.to(dtype)
    steps = block_length(x.device, d)
    if group_size == d and x.numel() <= steps * d:
        # A decoding step: nothing to cut, so no views and no buffers either.
        return _normalise(x, z, weight, norm_before_gate, eps).to(x.dtype).contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, groups = _rows(x, group_size), weight.view(-1, group_size)
    gates, y_rows = None if z is None else _rows(z, group_size), y.view(rows.shape)
    scratch = torch.empty(2, min(steps, len(rows)), *groups.shape, dtype=dtype, device=x.device)
    for start in range(0, len(rows), steps):
        part = slice(start, start + steps)
        out = y_rows[part]
        gate, result = scratch[:, : len(out)]
        result = out if out.dtype == dtype else result
        _normalise(rows[part], None if gates is None else gates[part], groups, norm_before_gate, eps, gate, result)
        if result is not out:
            out.copy_(result)
    return y


def backward(
    dy: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, norm_before_gate: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`dx, dz, dweight` in their tensors' dtypes; `dz` has no elements without a gate."""
    dtype = accumulation_dtype(x.dtype)
    gate_first, gate_last = z is not None and not norm_before_gate, z is not None and norm_before_gate
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dz = x.new_empty(0) if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    rows, grads, groups = _rows(x, group_size), _rows(dy, group_size), weight.to(dtype).view(-1, group_size)
    gates = None if z is None else _rows(z, group_size)
    dx_rows, dz_rows = dx.view(rows.shape), dz if z is None else dz.view(rows.shape)
    dweight = torch.zeros_like(groups)
    steps = block_length(x.device, x.shape[-1])
    scratch = torch.empty(5, min(steps, len(rows)), *groups.shape, dtype=dtype, device=x.device)
    for start in range(0, len(rows), steps):
        part = slice(start, start + steps)
        value, grad = rows[part].to(dtype), grads[part].to(dtype)
        normed, h, product, gate, slope = scratch[:, : len(value)]
        if gates is not None:
            silu(product.copy_(gates[part]), out=gate)
            silu_slope_(slope.copy_(gates[part]), product)
        u = torch.mul(value, gate, out=normed) if gate_first else value
        inverse = _inverse_rms(u, eps)
        torch.mul(u, inverse, out=normed)
        if gate_last:
            dz_rows[part] = torch.mul(grad, normed, out=product).mul_(groups).mul_(slope)
            grad = torch.mul(grad, gate, out=h)
        dweight += torch.mul(grad, normed, out=product).sum(0)
        torch.mul(grad, groups, out=h)
        mean = torch.mul(h, normed, out=product).mean(-1, keepdim=True)
        du = h.sub_(normed.mul_(mean)).mul_(inverse)
        if gate_first:
            dz_rows[part] = torch.mul(du, value, out=product).mul_(slope)
            du.mul_(gate)
        dx_rows[part] = du
    return dx, dz, dweight.view(-1).to(weight.dtype)


def _rows(x: Tensor, group_size: int) -> Tensor:
    """`(rows, groups, group_size)`, a view wherever the rows are evenly spaced."""
    return x.reshape(-1, x.shape[-1] // group_size, group_size)


def _normalise(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    norm_before_gate: bool,
    eps: float,
    scratch: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One block, over its last dimension, in the dtype of `weight`; `scratch` holds the gate, `out` the result."""
    u = x.to(weight.dtype)
    gate = None if z is None else silu(z.to(weight.dtype), out=scratch)
    if gate is not None and not norm_before_gate:
        u = gate.mul_(u)
    y = torch.mul(u, _inverse_rms(u, eps), out=out).mul_(weight)
    return y if gate is None or not norm_before_gate else y.mul_(gate)


def _inverse_rms(u: Tensor, eps: float) -> Tensor:
    """`(rows, groups, 1)`; `vector_norm` is one pass and on a CPU 2 to 20 times as fast as `square().mean()`."""
    return torch.linalg.vector_norm(u, dim=-1, keepdim=True).square_().div_(u.shape[-1]).add_(eps).rsqrt_()
