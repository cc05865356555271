"""Random SSD problems: what the tests of the operator share, and the hypothesis strategies over their sizes.

A problem holds rounded inputs. `evaluate` runs an implementation on it and returns values and gradients by name, for
fixed cotangents, so that two implementations, or one in two dtypes, are compared entry by entry.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dualscan.ops.ssd import linear_attention, ssd
from tests.oracle import assert_close

PARAMETERS = ("A", "D", "dt_bias", "initial_states")


@dataclass(frozen=True)
class Problem:
    """Inputs of `ssd` or `linear_attention` by argument name, and the fixed cotangents of its two results."""

    face: Callable[..., Any]
    tensors: dict[str, Tensor]
    dy: Tensor
    dfinal: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, **options: Any) -> Any:
        return self.face(**self.tensors, **self.options, **options)

    def double(self) -> "Problem":
        """The same rounded numbers in float64."""
        tensors = {name: t.double() for name, t in self.tensors.items()}
        return replace(self, tensors=tensors, dy=self.dy.double(), dfinal=self.dfinal.double())

    def having(self, **tensors: Tensor) -> "Problem":
        """The same problem with other tensors."""
        return replace(self, tensors={**self.tensors, **tensors})


def packed(lengths: list[int]) -> Tensor:
    """`cu_seqlens` of sequences of these lengths."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def ssd_problem(
    *,
    batch: int = 2,
    seqlen: int = 40,
    nheads: int = 4,
    headdim: int = 8,
    ngroups: int = 2,
    d_state: int = 16,
    dtype: torch.dtype = torch.float32,
    lengths: list[int] | None = None,
    D: str | None = None,
    z: bool = False,
    dt_bias: bool = False,
    states: bool = False,
    decay: float = 1.0,
    **options: Any,
) -> Problem:
    """A problem for `ssd`; `decay` multiplies A, `lengths` packs sequences along time."""
    if lengths is not None:
        batch, seqlen = 1, sum(lengths)
        options["cu_seqlens"] = packed(lengths)
    nseq = batch if lengths is None else len(lengths)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        "x": torch.randn(batch, seqlen, nheads, headdim).to(dtype),
        "dt": (torch.rand(batch, seqlen, nheads) if not dt_bias else torch.randn(batch, seqlen, nheads)).to(dtype),
        "A": -(torch.rand(nheads) + 0.1).to(wide) * decay,
        "B": torch.randn(batch, seqlen, ngroups, d_state).to(dtype),
        "C": torch.randn(batch, seqlen, ngroups, d_state).to(dtype),
    }
    if D is not None:
        tensors["D"] = torch.randn((nheads,) if D == "scalar" else (nheads, headdim)).to(wide)
    if z:
        tensors["z"] = torch.randn(batch, seqlen, nheads, headdim).to(dtype)
    if dt_bias:
        tensors["dt_bias"] = torch.randn(nheads).to(wide)
        options["dt_softplus"] = True
    if states:
        tensors["initial_states"] = torch.randn(nseq, nheads, headdim, d_state).to(wide)
    dfinal = torch.randn(nseq, nheads, headdim, d_state).to(wide)
    return Problem(ssd, tensors, torch.randn(batch, seqlen, nheads, headdim).to(dtype), dfinal, options)


def attention_problem(
    *,
    batch: int = 2,
    seqlen: int = 40,
    nheads: int = 4,
    headdim: int = 8,
    ngroups: int = 2,
    d_state: int = 16,
    dtype: torch.dtype = torch.float32,
    lengths: list[int] | None = None,
    decay: float | None = 1.0,
    resets: bool = False,
    states: bool = False,
    **options: Any,
) -> Problem:
    """A problem for `linear_attention`; `resets` puts log-decays of -inf, and of exactly 0, between the others."""
    if lengths is not None:
        batch, seqlen = 1, sum(lengths)
        options["cu_seqlens"] = packed(lengths)
    nseq = batch if lengths is None else len(lengths)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    positive = bool(options.get("normalize"))
    rows = headdim + positive
    tensors = {
        "q": torch.randn(batch, seqlen, ngroups, d_state).to(dtype),
        "k": torch.randn(batch, seqlen, ngroups, d_state).to(dtype),
        "v": torch.randn(batch, seqlen, nheads, headdim).to(dtype),
    }
    if positive:
        tensors["q"], tensors["k"] = tensors["q"].abs(), tensors["k"].abs()
    if decay is not None:
        log_decay = -torch.rand(batch, seqlen, nheads, dtype=wide) * decay
        if resets:
            log_decay[:, 3::7] = 0.0
            log_decay[:, ::5] = -math.inf
        tensors["log_decay"] = log_decay
    if states:
        tensors["initial_states"] = torch.rand(nseq, nheads, rows, d_state).to(wide)
    dy, dfinal = torch.randn(batch, seqlen, nheads, headdim).to(dtype), torch.randn(nseq, nheads, rows, d_state)
    return Problem(linear_attention, tensors, dy, dfinal.to(wide), options)


def evaluate(
    problem: Problem, *, through: tuple[str, ...] = ("y", "final_states"), **options: Any
) -> dict[str, Tensor]:
    """Both results, and the gradient of every tensor as `d<name>`, through the results named in `through`."""
    leaves = {name: t.detach().requires_grad_() for name, t in problem.tensors.items()}
    output = replace(problem, tensors=leaves)(**options)
    cotangents = {"y": problem.dy, "final_states": problem.dfinal}
    torch.autograd.backward(
        [getattr(output, name) for name in through],
        [cotangents[name] for name in through],
        inputs=list(leaves.values()),
    )
    grads = {f"d{name}": torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}
    return {"y": output.y.detach(), "final_states": output.final_states.detach(), **grads}


def assert_matches(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    *,
    dtype: torch.dtype,
    yardstick: dict[str, Tensor] | None = None,
) -> None:
    """Every value and every gradient within the oracle's tolerance."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(
            name,
            actual[name],
            expected[name],
            dtype=dtype,
            gradient=name not in ("y", "final_states"),
            yardstick=None if yardstick is None else yardstick[name],
        )


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, int]:
    """Small sizes of every dimension, with any number of groups that divides the heads."""
    ngroups = draw(st.sampled_from([1, 2, 3]))
    return {
        "batch": draw(st.integers(1, 3)),
        "seqlen": draw(st.integers(1, 40)),
        "ngroups": ngroups,
        "nheads": ngroups * draw(st.integers(1, 3)),
        "headdim": draw(st.integers(1, 9)),
        "d_state": draw(st.integers(1, 9)),
    }


def pack_lengths() -> st.SearchStrategy[list[int]]:
    """Lengths of packed sequences: empty ones, equal ones and single tokens among them."""
    mixed = st.lists(st.integers(0, 20), min_size=1, max_size=5)
    equal = st.tuples(st.integers(1, 20), st.integers(1, 4)).map(lambda pair: [pair[0]] * pair[1])
    return st.one_of(mixed, equal)
