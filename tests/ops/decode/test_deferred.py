"""States that are written once every few tokens: in the interpreter, on a GPU as it is."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualscan.generate.graph import deferred
from dualscan.nn import block as block_module
from dualscan.nn.mamba2 import Mamba2State
from dualscan.nn.step import describe
from tests.ops.decode.states import called, double, start
from tests.ops.decode.test_fused import CUDA, DEVICE, DTYPES, stack
from tests.oracle import assert_close, relative_error

pytest.importorskip("triton")
from dualscan.ops.decode import triton_fused
from dualscan.ops.decode.triton_fused import Deferred

pytestmark = [] if CUDA else [pytest.mark.usefixtures("interpreter")]
DTYPE = DTYPES[0]
KEPT = 4
SHIPPED = triton_fused.KEPT


@pytest.fixture(autouse=True)
def constants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_fused, "DTYPES", DTYPES)
    monkeypatch.setattr(triton_fused, "KEPT", KEPT)


class Layer:
    """A layer's kernel of the state alone: what it is given comes from nowhere else."""

    def __init__(self, ngroups: int = 1, **sizes: Any):
        sizes = {"d_inner": 128, "headdim": 64, "ngroups": ngroups, "norm_groups": 1} | sizes
        (block,) = stack(DTYPE, sizes)
        self.mixer: Any = block.mixer
        self.parameters, self.sizes = describe(self.mixer, block.norm)
        self.columns = len(self.parameters.in_weight)

    def tokens(self, count: int, batch: int) -> Tensor:
        """What `projected` may be, `(count, batch, columns)`."""
        return torch.randn(count, batch, self.columns, device=DEVICE).to(DTYPE)

    def state(self, batch: int, dtype: torch.dtype) -> Tensor:
        mixer = self.mixer
        return torch.randn(batch, mixer.nheads, mixer.headdim, mixer.d_state, device=DEVICE).to(dtype)

    def defer(self, ssm: Tensor) -> Deferred:
        """With what must not be read as NaN."""
        count = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        state = triton_fused.defer(self.parameters, self.sizes, torch.empty(0), ssm, count)
        for t in (state.kept.x, state.kept.B, state.kept.dt, state.kept.sums):
            t.fill_(float("nan"))
        return state

    def step(self, ssm: Tensor, projected: Tensor, kept: triton_fused.Kept | None) -> Tensor:
        """What the output matrix takes, before its division by the root mean square."""
        gated = torch.empty(len(ssm), self.mixer.d_inner, dtype=DTYPE, device=DEVICE)
        squares = gated.new_empty(len(ssm), gated.shape[1] // triton_fused._state_tile(ssm, kept)[0]).float()
        triton_fused._step_state(len(ssm), ssm, projected, self.parameters, self.sizes, gated, squares, kept)
        if kept is not None:
            kept.count.add_(1)
        assert_close("squares", squares.sum(1), self.ungained(gated).square().sum(1), dtype=DTYPE)
        return gated

    def ungained(self, gated: Tensor) -> Tensor:
        return gated.double() / self.parameters.norm_weight.double()

    def exact(self, ssm: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """The same in float64 by the recurrence, and the next state."""
        mixer, p = self.mixer, self.parameters
        z, x, B, C, dt = projected.double().split(
            [mixer.d_inner, mixer.d_inner, *[mixer.ngroups * mixer.d_state] * 2, mixer.nheads], -1
        )
        x = x.unflatten(-1, (mixer.nheads, -1))
        B, C = (
            t.unflatten(-1, (mixer.ngroups, -1)).repeat_interleave(mixer.nheads // mixer.ngroups, 1) for t in (B, C)
        )
        dt = F.softplus(dt + p.dt_bias.double())
        decay = torch.exp(-dt * p.A_log.double().exp())
        ssm = decay[..., None, None] * ssm.double() + (dt[..., None] * x)[..., None] * B[..., None, :]
        y = (ssm @ C[..., None]).squeeze(-1) + p.D.double()[:, None] * x
        return p.norm_weight.double() * (y.flatten(1) * F.silu(z)), ssm


class Run(NamedTuple):
    """Outputs `(tokens, batch, d_inner)` and states `(tokens, ...)` after every token, and what was kept last."""

    outputs: Tensor
    states: Tensor
    kept: triton_fused.Kept | None


def run(layer: Layer, ssm: Tensor, tokens: Tensor, form: str) -> Run:
    kept, outputs, states = None, [], []
    ssm = ssm.clone()
    if form == "deferred":
        kept = layer.defer(ssm).kept
    for projected in tokens:
        if form == "exact":
            out, ssm = layer.exact(ssm, projected)
        else:
            out = layer.step(ssm, projected, kept)
        outputs.append(out.clone())
        states.append(ssm.clone())
    return Run(torch.stack(outputs), torch.stack(states), kept)


CASES = [
    ({"ngroups": 2}, 3, torch.float32),
    ({}, 1, torch.bfloat16),
    ({"ngroups": 2, "d_state": 256}, 1, torch.float32),  # several programs a head
    ({"d_state": 64}, 1, torch.bfloat16),  # several tiles a program, and parts of their rows
    pytest.param({}, 1, torch.float32, marks=pytest.mark.slow),
    pytest.param({"d_state": 32}, 32, torch.bfloat16, marks=pytest.mark.slow),
    pytest.param({"ngroups": 2}, 3, torch.bfloat16, marks=pytest.mark.slow),
    pytest.param({"headdim": 48, "d_inner": 144}, 2, torch.bfloat16, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("sizes", "batch", "state_dtype"), CASES, ids=str)
def test_equals_the_recurrence(sizes: dict[str, Any], batch: int, state_dtype: torch.dtype) -> None:
    layer = Layer(**sizes)
    ssm, tokens = layer.state(batch, state_dtype), layer.tokens(2 * KEPT + 1, batch)
    got, now, right = (run(layer, ssm, tokens, form) for form in ("deferred", "immediate", "exact"))
    for token in range(len(tokens)):
        coarse = DTYPE if token < KEPT or state_dtype == torch.float32 else torch.bfloat16
        assert_close("y", got.outputs[token], right.outputs[token], dtype=coarse, yardstick=now.outputs[token])
    written = [KEPT - 1, 2 * KEPT - 1]
    for token in written:
        exact = right.states[token]
        assert_close("ssm", got.states[token], exact, dtype=state_dtype, yardstick=now.states[token])
    for token in range(len(tokens)):
        before = got.states[token - 1] if token else ssm
        assert torch.equal(got.states[token], before) == (token not in written)


@pytest.mark.parametrize("d_state", [16, 256])
def test_as_many_tokens_as_in_use(d_state: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 256 columns a program has one tile; tests have other numbers of tokens to be fast."""
    monkeypatch.setattr(triton_fused, "KEPT", SHIPPED)
    layer = Layer(d_state=d_state, ngroups=2)
    ssm, tokens = layer.state(1, torch.float32), layer.tokens(SHIPPED + 2, 1)
    got, now, right = (run(layer, ssm, tokens, form) for form in ("deferred", "immediate", "exact"))
    assert_close("y", got.outputs, right.outputs, dtype=DTYPE, yardstick=now.outputs)
    exact, yardstick = right.states[SHIPPED - 1], now.states[SHIPPED - 1]
    assert_close("ssm", got.states[-1], exact, dtype=torch.float32, yardstick=yardstick)


@pytest.mark.slow
def test_bfloat16_states_are_rounded_less_often() -> None:
    layer = Layer()
    ssm, tokens = layer.state(2, torch.bfloat16), layer.tokens(4 * KEPT, 2)
    got, now, right = (run(layer, ssm, tokens, form) for form in ("deferred", "immediate", "exact"))
    assert relative_error(got.states[-1], right.states[-1]) < 0.8 * relative_error(now.states[-1], right.states[-1])


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_forgotten_leaves_nothing_behind(state_dtype: torch.dtype) -> None:
    """Resets of any strength between tokens that are remembered for long, with step sizes of any size."""
    layer = Layer()
    dt_bias, A_log = layer.parameters.dt_bias.detach(), layer.parameters.A_log.detach()
    A_log.fill_(0.0)
    dt_bias.copy_(torch.tensor([1.0, -3.0], device=DEVICE))
    ssm, tokens = layer.state(1, state_dtype), layer.tokens(4 * KEPT, 1)
    raw = torch.tensor([-9.0, 50.0, -9.0, -9.0, 1e4, -9.0, 1e4, 1e4, 1e4, 1e4, 1e4, -9.0, 200.0, -9.0, -9.0, -9.0])
    tokens[:, 0, -2:] = raw[:, None].to(DEVICE, DTYPE)
    got, now, right = (run(layer, ssm, tokens, form) for form in ("deferred", "immediate", "exact"))
    coarse = DTYPE if state_dtype == torch.float32 else torch.bfloat16
    for token in range(len(tokens)):
        assert_close("y", got.outputs[token], right.outputs[token], dtype=coarse, yardstick=now.outputs[token])
    assert_close("ssm", got.states[-1], right.states[-1], dtype=state_dtype, yardstick=now.states[-1])


def test_what_is_kept() -> None:
    """Of the tokens since the last write x and B as they came; other slots hold what they did, and are not read."""
    layer = Layer(ngroups=2)
    ssm, tokens = layer.state(2, torch.float32), layer.tokens(2 * KEPT - 1, 2)
    got = run(layer, ssm, tokens, "deferred")
    kept, d_inner = got.kept, layer.mixer.d_inner
    assert kept is not None
    assert got.outputs.isfinite().all()
    last = tokens[KEPT:].transpose(0, 1)
    assert torch.equal(kept.x[:, : KEPT - 1], last[..., d_inner : 2 * d_inner])
    assert torch.equal(kept.B[:, : KEPT - 1], last[..., 2 * d_inner : 2 * d_inner + kept.B.shape[2]])
    for t in (kept.x[:, -1], kept.B[:, -1], kept.dt[..., -1], kept.sums[..., -1]):
        assert t.isnan().all()


def test_repeats_bitwise_whenever_it_begins() -> None:
    """The count goes on beyond its largest value."""
    layer = Layer(ngroups=2)
    ssm, tokens = layer.state(2, torch.bfloat16), layer.tokens(KEPT + 1, 2)
    one, two = (run(layer, ssm, tokens, "deferred") for _ in range(2))
    assert torch.equal(one.outputs, two.outputs)
    assert torch.equal(one.states, two.states)
    late = layer.defer(ssm.clone())
    late.kept.count.fill_(2**31 - KEPT)
    outputs = [layer.step(late.ssm, projected, late.kept) for projected in tokens]
    assert torch.equal(torch.stack(outputs), one.outputs)
    assert torch.equal(late.ssm, one.states[-1])


@torch.no_grad()
def steps(blocks: torch.nn.ModuleList, tokens: Tensor, states: Sequence[Any]) -> tuple[Tensor, Sequence[Any]]:
    """Tokens through a stack of blocks as on a GPU: `(tokens, batch, d_model)`, and the states."""
    rows = []
    for row in tokens:
        h, states = block_module._step_on_gpu(blocks, row.unsqueeze(1), states)
        rows.append(h[:, 0])
    return torch.stack(rows), states


@pytest.mark.slow
@torch.no_grad()
def test_a_stack_of_all_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that are deferred between such as are not."""
    monkeypatch.setattr(triton_fused, "DEFERRED_ROWS", 2)
    monkeypatch.setattr(triton_fused, "KEPT", 2)
    monkeypatch.setattr(triton_fused, "WIDE", 64 if CUDA else 256)
    blocks = stack(DTYPE, {}, {"norm_groups": 2}, None, {"ngroups": 2, "norm_groups": 1})
    h, given = torch.randn(3, 2, 128, device=DEVICE), start(blocks, DTYPE, 2, torch.float32)
    exact, wide = copy.deepcopy(blocks).double(), double(given)
    expected = called(exact, h.double(), wide)
    states = deferred(blocks, given, given)
    assert [type(state) for state in states] == [Deferred, Mamba2State, type(None), Deferred]
    count = states[0].kept.count
    assert states[3].kept.count is count
    got, after = steps(blocks, h, states)
    assert count.item() == len(h)
    assert all(state is old for state, old in zip(after, states, strict=True) if isinstance(old, Deferred))
    assert_close("h", got, torch.stack(expected), dtype=DTYPE)


@torch.no_grad()
def test_what_is_deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_fused, "DEFERRED_ROWS", 2)
    blocks = stack(DTYPE, {}, None)
    before = start(blocks, DTYPE, 2, torch.bfloat16)

    def kinds(old: Sequence[Any], new: Sequence[Any]) -> list[bool]:
        return [isinstance(state, Deferred) for state in deferred(blocks, old, new)]

    ssm = before[0].ssm.clone()
    assert kinds(before, before) == [True, False]
    assert torch.equal(before[0].ssm, ssm), "nothing runs yet"
    assert kinds(before, copy.deepcopy(before)) == [False, False], "not changed in place: another way was taken"
    few = start(blocks, DTYPE, 1, torch.bfloat16)
    assert kinds(few, few) == [False, False]
    monkeypatch.setattr(triton_fused, "DTYPES", ())
    assert kinds(before, before) == [False, False]


def test_what_is_kept_is_small() -> None:
    """Of a layer of 2.7B, as the comment at `KEPT` says."""
    nheads, headdim, d_state, kept = 80, 64, 128, 8
    numbers = kept * (2 * nheads * headdim + 2 * d_state + (4 + 8) * nheads)
    assert 0.065 < numbers / (2 * nheads * headdim * d_state) < 0.0725
