"""The selective scan in chunks of time, forward and backward: the portable fast path.

What does not depend on the state is computed for a whole chunk at once: a = exp(Δ A), the inputs Δ x ⊗ B, and after the
states their products with C. Between stands one multiply-add a token, in place, over a state that stays in cache:

    h_t = a_t h_{t-1} + Δ_t x_t ⊗ B_t.

Memory beyond inputs and outputs is that of one chunk of a few rows. (A tree of pairs (a, h), the associative form,
needs log2 of the chunk's length such passes instead of one: 3 to 4 times as slow on a CPU, docs/log.md.)

The backward pass recomputes instead of saving. It runs forward once to keep the state at every chunk's start, one in
`CHUNK` tokens, then takes the chunks in reverse: the states of a chunk again, and with them, ds being the gradient of
the sum before the gate,

    g_t = ds_t ⊗ C_t + a_{t+1} g_{t+1},    dB_t = Σ_c Δ x g,    dC_t = Σ_c ds h,    d(Δ x) = Σ_n B g,
    d(Δ A) = g_t a_t h_{t-1},
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dualscan.ops._pointwise import accumulation_dtype, silu, silu_slope_
from dualscan.ops.selective_scan.reference import step_size
from dualscan.ops.ssd.blocks import exp_, pieces

CHUNK = 64


@dataclass(frozen=True, slots=True)
class Parameters:
    """What every token shares, in the compute dtype."""

    A: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.A.dtype

    @classmethod
    def of(cls, A: Tensor, D: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, x: Tensor) -> "Parameters":
        """Casts them."""
        dtype = accumulation_dtype(x.dtype)
        D, dt_bias = (None if t is None else t.to(dtype) for t in (D, dt_bias))
        return cls(A.to(dtype), D, dt_bias, dt_softplus)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk's tensors in the compute dtype: x, delta (b, q, d); B, C (b, q, g, n)."""

    x: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor

    @classmethod
    def of(cls, shared: Parameters, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> "Chunk":
        """Casts them, and makes dt the step size."""
        delta = step_size(dt, shared.dt_bias, shared.dt_softplus, shared.dtype)
        return cls(x.to(shared.dtype), delta, B.to(shared.dtype), C.to(shared.dtype))

    def grouped(self, t: Tensor) -> Tensor:
        """(b, q, d) -> (b, q, g, d / g)."""
        return t.unflatten(-1, (self.B.shape[2], -1))

    def states(self, shared: Parameters, start: Tensor) -> tuple[Tensor, Tensor]:
        """The decays and the states (b, q, d, n) of every token, from the state `start` (b, d, n) on."""
        decay = exp_(self.delta.unsqueeze(-1) * shared.A)
        inputs = self.grouped(self.delta * self.x)
        h = (inputs.unsqueeze(-1) * self.B.unsqueeze(-2)).flatten(2, 3)
        for t in range(h.shape[1]):
            start = h[:, t].addcmul_(decay[:, t], start)
        return decay, h

    def read(self, h: Tensor, columns: Tensor) -> Tensor:
        """Σ_n of h (b, q, d, n) with B or C: (b, q, d)."""
        h = h.unflatten(2, (self.B.shape[2], -1))
        return torch.matmul(h, columns.unsqueeze(-1)).flatten(2)

    def gather(self, weights: Tensor, h: Tensor) -> Tensor:
        """Σ_c of weights (b, q, d) with h (b, q, d, n), group by group: (b, q, g, n)."""
        h = h.unflatten(2, (self.B.shape[2], -1))
        return torch.matmul(self.grouped(weights).unsqueeze(-2), h).squeeze(-2)


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Returns `y` (b, l, d) in x's dtype and final states (b or nseq, d, n) in the compute dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shared = Parameters.of(A, D, dt_bias, dt_softplus, x)
    # A sequence without tokens keeps its initial state.
    finals = _states(x, A, initial_states, cu_seqlens)
    for piece in pieces(x.unsqueeze(-1), cu_seqlens):
        state = finals[piece.rows]
        inputs = [piece.tokens(t).split(CHUNK, dim=1) for t in (x, dt, B, C)]
        gates = None if z is None else piece.tokens(z).split(CHUNK, dim=1)
        for i, (out, *tensors) in enumerate(zip(piece.tokens(y).split(CHUNK, dim=1), *inputs, strict=True)):
            chunk = Chunk.of(shared, *tensors)
            _, h = chunk.states(shared, state)
            state = h[:, -1]
            sums = chunk.read(h, chunk.C)
            if shared.D is not None:
                sums.addcmul_(chunk.x, shared.D)
            out.copy_(sums if gates is None else sums.mul_(silu(gates[i].to(shared.dtype))))
        finals[piece.rows].copy_(state)
    return y, finals


def backward(
    dy: Tensor | None,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, ...]:
    """Gradients of all tensors but cu_seqlens, in their order; an empty tensor for an argument that was None."""
    if dy is None:
        dy = torch.zeros(1, dtype=x.dtype, device=x.device).expand(x.shape)
    shared = Parameters.of(A, D, dt_bias, dt_softplus, x)
    dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dA, channels = torch.zeros_like(shared.A), x.shape[2]
    sums = ParameterGradients(dA, dA.new_zeros(channels), dA.new_zeros(channels))
    starts = _states(x, A, initial_states, cu_seqlens)
    # The gradient of the state that a piece ends with, and at last of the one that it starts with.
    dstates = torch.zeros_like(starts)
    if dfinal is not None:
        dstates.copy_(dfinal)
    for piece in pieces(x.unsqueeze(-1), cu_seqlens):
        inputs = [piece.tokens(t).split(CHUNK, dim=1) for t in (x, dt, B, C)]
        outputs = [piece.tokens(t).split(CHUNK, dim=1) for t in (dy, dx, ddt, dB, dC)]
        gates = None if z is None or dz is None else [piece.tokens(t).split(CHUNK, dim=1) for t in (z, dz)]
        kept = [starts[piece.rows]]
        for tensors in list(zip(*inputs, strict=True))[:-1]:
            kept.append(Chunk.of(shared, *tensors).states(shared, kept[-1])[1][:, -1].clone())
        carried = dstates[piece.rows]
        for i in reversed(range(len(kept))):
            chunk = Chunk.of(shared, *(split[i] for split in inputs))
            dy_c, *grads = (split[i] for split in outputs)
            gate = None if gates is None else (gates[0][i], gates[1][i])
            carried = _backward_chunk(chunk, inputs[1][i], dy_c, gate, grads, sums, shared, kept.pop(), carried)
        dstates[piece.rows].copy_(carried)
    return (
        *(dx, ddt, sums.dA.to(A.dtype), dB, dC),
        x.new_empty(0) if D is None else sums.dD.to(D.dtype),
        x.new_empty(0) if dz is None else dz,
        x.new_empty(0) if dt_bias is None else sums.ddt_bias.to(dt_bias.dtype),
        x.new_empty(0) if initial_states is None else dstates.to(initial_states.dtype),
    )


@dataclass(frozen=True, slots=True)
class ParameterGradients:
    """Sums over all tokens that grow from chunk to chunk."""

    dA: Tensor
    dD: Tensor
    ddt_bias: Tensor


def _backward_chunk(
    chunk: Chunk,
    dt: Tensor,
    dy: Tensor,
    gate: tuple[Tensor, Tensor] | None,
    grads: list[Tensor],
    sums: ParameterGradients,
    shared: Parameters,
    start: Tensor,
    carried: Tensor,
) -> Tensor:
    """Fills `grads` (and dz, the second of `gate`), adds to `sums`, and returns the gradient of the state `start`."""
    dx, ddt, dB, dC = grads
    decay, h = chunk.states(shared, start)
    ds = dy.to(shared.dtype)
    if gate is not None:
        z, dz = gate
        outputs = chunk.read(h, chunk.C)
        if shared.D is not None:
            outputs.addcmul_(chunk.x, shared.D)
        z = z.to(shared.dtype)
        outer, ds = ds, ds * silu(z)
        dz.copy_(silu_slope_(z.clone(), torch.empty_like(z)).mul_(outputs).mul_(outer))
    dC.copy_(chunk.gather(ds, h))
    g = (chunk.grouped(ds).unsqueeze(-1) * chunk.C.unsqueeze(-2)).flatten(2, 3)
    last = g.shape[1] - 1
    g[:, last].add_(carried)
    for t in range(last - 1, -1, -1):
        g[:, t].addcmul_(decay[:, t + 1], g[:, t + 1])
    dB.copy_(chunk.gather(chunk.delta * chunk.x, g))
    dinputs = chunk.read(g, chunk.B)
    g.mul_(decay)  # the gradient of a_t h_{t-1}, through a_t h_{t-1} from here on
    carried = g[:, 0].clone()
    g[:, 0].mul_(start)
    g[:, 1:].mul_(h[:, :-1])
    ddelta = (g * shared.A).sum(-1).addcmul_(dinputs, chunk.x)
    sums.dA.add_(g.mul_(chunk.delta.unsqueeze(-1)).sum((0, 1)))
    dinputs.mul_(chunk.delta)
    if shared.D is not None:
        sums.dD.add_((ds * chunk.x).sum((0, 1)))
        dinputs.addcmul_(ds, shared.D)
    dx.copy_(dinputs)
    if shared.dt_softplus:
        dt = step_size(dt, shared.dt_bias, False, shared.dtype)
        ddelta.div_(torch.neg(dt).exp_().add_(1))  # as `silu`: the same bits wherever an element stands
    if shared.dt_bias is not None:
        sums.ddt_bias.add_(ddelta.sum((0, 1)))
    ddt.copy_(ddelta)
    return carried


def _states(x: Tensor, A: Tensor, initial_states: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The states before the first tokens, fresh memory in the compute dtype."""
    nseq, dtype = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, accumulation_dtype(x.dtype)
    if initial_states is None:
        return torch.zeros(nseq, *A.shape, dtype=dtype, device=x.device)
    return initial_states.to(dtype, copy=True, memory_format=torch.contiguous_format)
