"""Random convolutions, the brute-force oracle that sums tap by tap and token by token, and the comparison of both."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dualscan.ops.conv1d import Conv1dOutput, causal_conv1d
from tests.oracle import assert_close
from tests.strategies import packed


@dataclass(frozen=True)
class Problem:
    """Inputs of `causal_conv1d` by argument name, and fixed cotangents of its two results."""

    tensors: dict[str, Tensor]
    dy: Tensor
    dfinal: Tensor
    activation: str | None = "silu"
    cu_seqlens: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Problem":
        """The problem with `fn` applied to every tensor."""
        tensors = {name: fn(t) for name, t in self.tensors.items()}
        return replace(self, tensors=tensors, dy=fn(self.dy), dfinal=fn(self.dfinal))

    def __call__(self, **options: str) -> Conv1dOutput:
        return causal_conv1d(**self.tensors, activation=self.activation, cu_seqlens=self.cu_seqlens, **options)


def problem(
    *,
    batch: int = 2,
    seqlen: int = 9,
    channels: int = 5,
    width: int = 4,
    bias: bool = True,
    states: bool = True,
    activation: str | None = "silu",
    lengths: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    if lengths is not None:
        batch, seqlen = 1, sum(lengths)
    nseq = batch if lengths is None else len(lengths)
    tensors = {"x": torch.randn(batch, seqlen, channels), "weight": torch.randn(channels, width)}
    if bias:
        tensors["bias"] = torch.randn(channels)
    if states:
        tensors["initial_states"] = torch.randn(nseq, channels, width - 1)
    made = Problem(
        tensors,
        torch.randn(batch, seqlen, channels),
        torch.randn(nseq, channels, width - 1),
        activation,
        None if lengths is None else packed(lengths),
    )
    return made.map(lambda t: t.to(dtype))


def brute_force(p: Problem) -> Conv1dOutput:
    """Every output token from its definition; a list of tokens per sequence is all the state there is."""
    x, weight = p.tensors["x"], p.tensors["weight"]
    states, bias = p.tensors.get("initial_states"), p.tensors.get("bias")
    width = weight.shape[1]
    if p.cu_seqlens is None:
        sequences = [list(row) for row in x]
    else:
        bounds = p.cu_seqlens.tolist()
        sequences = [list(x[0, bounds[i] : bounds[i + 1]]) for i in range(len(bounds) - 1)]
    y, final = [], []
    for i, tokens in enumerate(sequences):
        zero = torch.zeros_like(weight[:, 0])
        history = [zero if states is None else states[i, :, k] for k in range(width - 1)] + tokens
        for t in range(len(tokens)):
            value = sum((weight[:, j] * history[t + j] for j in range(width)), start=zero)
            value = value if bias is None else value + bias
            y.append(value if p.activation is None else value * torch.sigmoid(value))
        last = history[len(history) - (width - 1) :]
        final.append(torch.stack(last, dim=-1) if last else x.new_zeros(x.shape[2], 0))
    ys = torch.stack(y) if y else x.new_zeros(0, x.shape[2])
    finals = torch.stack(final) if final else x.new_zeros(0, x.shape[2], width - 1)
    return Conv1dOutput(ys.view(x.shape), finals)


def evaluate(run: Callable[[Problem], Conv1dOutput], p: Problem) -> dict[str, Tensor]:
    """Values and gradients by name, for the cotangents of the problem."""
    leaves = {name: t.detach().requires_grad_() for name, t in p.tensors.items()}
    out = run(replace(p, tensors=leaves))
    # Zero times each leaf: what has no tokens to depend on has a gradient of zero rather than none.
    loss = (out.y * p.dy).sum() + (out.final_states * p.dfinal).sum() + sum((0 * t).sum() for t in leaves.values())
    found = zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)
    return {"y": out.y.detach(), "final_states": out.final_states.detach(), **{f"d{name}": g for name, g in found}}


def assert_matches_brute_force(p: Problem, **options: str) -> None:
    """Compares values and gradients with the float64 brute force on the same rounded inputs."""
    dtype = p.tensors["x"].dtype
    expected = evaluate(brute_force, p.map(Tensor.double))
    actual = evaluate(lambda q: q(**options), p)
    for name, value in actual.items():
        original = p.tensors.get(name[1:])
        assert value.dtype == (dtype if original is None else original.dtype), name
        assert_close(name, value, expected[name], dtype=dtype, gradient=name.startswith("d"))
