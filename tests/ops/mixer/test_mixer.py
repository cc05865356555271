"""The mixer as one operator against its three operators in float64: in the interpreter, on a GPU as it is."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dualscan.nn import precision
from dualscan.nn.mamba2 import Mamba2, Mamba2State
from dualscan.ops import mixer
from tests.oracle import assert_close
from tests.strategies import packed

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    # The float64 that results are compared with has no kernels.
    pytest.mark.filterwarnings("ignore:.* runs its portable PyTorch form on cuda"),
    *([] if CUDA else [pytest.mark.usefixtures("interpreter")]),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"ngroups": 2, "norm_groups": 4, "bias": True},
    "norm first, no bias": {"norm_before_gate": True, "conv_bias": False},
    "limit": {"dt_limit": (0.01, 0.05), "d_conv": 2},
    "states": {"state": True},
    # Lengths with which the three operators themselves stay below the caps in bfloat16.
    "packed": {"lengths": [25, 0, 1, 17]},
    "packed, states": {"lengths": [20, 13], "state": True, "ngroups": 2},
    "odd sizes": {"d_state": 11, "headdim": 6},
}


def layer(dtype: torch.dtype, **options: Any) -> Mamba2:
    torch.manual_seed(3)
    layer = Mamba2(24, **{"d_state": 16, "headdim": 8, **options})
    torch.nn.init.normal_(layer.D)
    assert layer.norm is not None
    torch.nn.init.uniform_(layer.norm.weight, 0.5, 1.5)
    return layer.to(DEVICE, dtype)


def fused(
    layer: Mamba2, zxbcdt: Tensor, state: Mamba2State | None, cu_seqlens: Tensor | None, keep: bool = True
) -> mixer.MixOutput:
    assert layer.norm is not None
    return mixer.mix(
        *(zxbcdt, layer.conv1d.weight, layer.conv1d.bias, layer.A_log, layer.dt_bias, layer.D),
        *(layer.norm.weight, layer._mixer_sizes),
        conv_states=None if state is None else state.conv,
        ssm_states=None if state is None else state.ssm,
        cu_seqlens=cu_seqlens,
        keep=keep,
    )


def composed(layer: Mamba2, zxbcdt: Tensor, state: Mamba2State | None, cu_seqlens: Tensor | None) -> mixer.MixOutput:
    """The three operators; the layer's own code without its projections."""
    layer.in_proj, layer.out_proj = torch.nn.Identity(), torch.nn.Identity()  # pyrefly: ignore[bad-assignment]
    layer.impl = "chunked"
    y, after = layer._sequence(zxbcdt, state, cu_seqlens)
    return mixer.MixOutput(y, *after, y)


def spaced(t: Tensor, more: int) -> Tensor:
    """`t` with so many NaN between its rows."""
    rows = torch.full((*t.shape[:-1], t.shape[-1] + more), torch.nan, dtype=t.dtype, device=t.device)
    return rows[..., : t.shape[-1]].copy_(t)


def run(
    form: Any, layer: Mamba2, dtype: torch.dtype, state: bool, lengths: list[int] | None, more: int = 0
) -> dict[str, Tensor]:
    """Results and all gradients by name, of inputs rounded to the layer's dtype; `more` as in `spaced`."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    low = layer.conv1d.weight.dtype
    batch, seqlen = (2, 33) if lengths is None else (1, sum(lengths))
    nseq = batch if lengths is None else len(lengths)
    width = layer.d_inner + layer.conv1d.in_channels + layer.nheads
    leaves = {"zxbcdt": spaced(normal(batch, seqlen, width).to(dtype).to(low), more)}
    states = None
    if state:
        leaves["conv"] = normal(nseq, layer.conv1d.in_channels, layer.d_conv - 1).to(dtype).to(low)
        leaves["ssm"] = normal(nseq, layer.nheads, layer.headdim, layer.d_state).to(layer.A_log.dtype)
        states = Mamba2State(leaves["conv"].requires_grad_(), leaves["ssm"].requires_grad_())
    leaves["zxbcdt"].requires_grad_()
    cotangents = [normal(batch, seqlen, layer.d_inner), normal(nseq, layer.conv1d.in_channels, layer.d_conv - 1)]
    cotangents.append(normal(nseq, layer.nheads, layer.headdim, layer.d_state))
    unused = ("in_proj", "out_proj")
    leaves |= {name: p for name, p in layer.named_parameters() if not name.startswith(unused)}
    cu_seqlens = None if lengths is None else packed(lengths).to(DEVICE)
    out = form(layer, leaves["zxbcdt"], states, cu_seqlens)
    pairs = [(t, c.to(dtype).to(t.dtype)) for t, c in zip(out[:3], cotangents, strict=True) if t.numel()]
    grads = torch.autograd.grad([t for t, _ in pairs], list(leaves.values()), [c for _, c in pairs])
    results = {name: getattr(out, name).detach().cpu() for name in ("y", "conv", "ssm")}
    return results | {f"d{name}": g.cpu() for name, g in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize(
    "dtype", [DTYPES[0], *(pytest.param(d, marks=pytest.mark.slow_interpreted) for d in DTYPES[1:])], ids=str
)
@pytest.mark.parametrize("case", CASES)
def test_one_operator_equals_three(case: str, dtype: torch.dtype) -> None:
    options = dict(CASES[case])
    state, lengths = options.pop("state", False), options.pop("lengths", None)
    made = layer(dtype, **options)
    got = run(fused, made, dtype, state, lengths)
    exact = Mamba2(24, **{"d_state": 16, "headdim": 8, **options}).to(DEVICE).double()
    exact.load_state_dict(made.state_dict())
    expected = run(composed, exact, dtype, state, lengths)
    same = run(composed, made, dtype, state, lengths)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        if value.numel():
            assert value.dtype == same[name].dtype
            options = {"gradient": True} if name.startswith("d") else {}
            assert_close(name, value, expected[name], dtype=dtype, **options)


@pytest.mark.parametrize("case", [pytest.param("plain", marks=pytest.mark.slow_interpreted), "packed, states"])
def test_what_is_not_kept_is_computed_again(case: str) -> None:
    options = dict(CASES[case])
    state, lengths = options.pop("state", False), options.pop("lengths", None)
    made = layer(torch.float32, **options)
    kept = run(fused, made, torch.float32, state, lengths)
    again = run(partial(fused, keep=False), made, torch.float32, state, lengths)
    assert all(torch.equal(kept[name], value) for name, value in again.items())
    zxbcdt = torch.randn(2, 20, made.in_proj.out_features, device=DEVICE, requires_grad=True)
    sizes = []
    for keep in (True, False):
        held: dict[int, int] = {}

        def hold(t: Tensor, held: dict[int, int] = held) -> Tensor:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
            fused(made, zxbcdt, None, None, keep=keep)
        sizes.append(sum(held.values()))
    assert sizes[0] - sizes[1] == 4 * 2 * 20 * made.conv1d.in_channels


@pytest.mark.parametrize("case", ["groups", pytest.param("packed, states", marks=pytest.mark.slow_interpreted)])
def test_rows_of_the_projection_may_be_spaced(case: str) -> None:
    options = dict(CASES[case])
    state, lengths = options.pop("state", False), options.pop("lengths", None)
    made = layer(torch.float16, **options)
    expected = run(fused, made, torch.float16, state, lengths)
    got = run(fused, made, torch.float16, state, lengths, more=7)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("batch", [1, 2])
def test_the_product_before_it_gets_a_gradient_of_whole_rows(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(torch.float16)
    weight = made.in_proj.weight.detach().float().requires_grad_()
    u = torch.randn(batch, 20, made.d_model, device=DEVICE, dtype=torch.float16, requires_grad=True)
    widths, results = [], []
    widened = precision._widened

    def watch(rows: Tensor, width: int) -> Tensor:
        wide = widened(rows, width)
        widths.append(wide.shape[1])
        return wide

    monkeypatch.setattr(precision, "_widened", watch)
    for multiple in (1, 32):
        y = fused(made, precision.Product.apply(u, weight, multiple), None, None).y
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (u, weight, made.conv1d.weight))))
    assert widths == [made.in_proj.out_features, 32 * -(-made.in_proj.out_features // 32)]
    for name, got, expected in zip(("y", "du", "dweight", "dconv"), *reversed(results), strict=True):
        assert_close(name, got, expected.double(), dtype=torch.float16)


def test_the_gate_can_be_applied_again() -> None:
    made = layer(torch.float32)
    zxbcdt = torch.randn(2, 20, made.in_proj.out_features, device=DEVICE)
    out = fused(made, zxbcdt, None, None)
    again = made._gate(out.scanned.flatten(2), zxbcdt[..., : made.d_inner])
    assert_close("y", again, out.y.double(), dtype=torch.float32)


@pytest.mark.parametrize("what", ["conv", "ssm"])
def test_states_of_another_batch_are_refused(what: str) -> None:
    made = layer(torch.float32)
    zxbcdt = torch.randn(2, 5, made.in_proj.out_features, device=DEVICE)
    sizes = {"conv": (made.conv1d.in_channels, 3), "ssm": (made.nheads, made.headdim, made.d_state)}
    states = {name: torch.zeros(2 + (name == what), *shape, device=DEVICE) for name, shape in sizes.items()}
    with pytest.raises(ValueError, match=f"{what} has batch 3; expected 2 sequences"):
        fused(made, zxbcdt, Mamba2State(**states), None)


def test_second_derivatives_are_refused() -> None:
    made = layer(torch.float32)
    zxbcdt = torch.randn(1, 5, made.in_proj.out_features, device=DEVICE, requires_grad=True)
    y = fused(made, zxbcdt, None, None).y
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y.sum(), zxbcdt, create_graph=True)


@pytest.mark.parametrize("more", [0, 7])
def test_the_boundary(more: int) -> None:
    made = layer(torch.float32, ngroups=2)
    zxbcdt = spaced(torch.randn(2, 20, made.in_proj.out_features, device=DEVICE), more).requires_grad_()
    assert made.norm is not None
    parameters = (made.conv1d.weight, made.conv1d.bias, made.A_log, made.dt_bias, made.D, made.norm.weight)
    values = (2, made.d_inner, False, 1e-5, 0.0, float("inf"), True)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    leaves = [None if t is None else t.detach().requires_grad_() for t in parameters]
    torch.library.opcheck(
        torch.ops.dualscan.mamba2_mix_fwd.default, (zxbcdt, *leaves, None, None, None, *values), test_utils=tests
    )


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_whoever_watches_sees_the_operators() -> None:
    made = layer(torch.float32)
    zxbcdt = torch.randn(1, 5, made.in_proj.out_features, device=DEVICE, requires_grad=True)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.autograd.grad(fused(made, zxbcdt, None, None).y.sum(), zxbcdt)
    names = [f"dualscan.mamba2_mix_{which}.default" for which in ("fwd", "bwd")]
    assert [name for name in seen if name.startswith("dualscan")] == names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(fused(made, zxbcdt, None, None).y.sum(), zxbcdt)
    assert {"dualscan::mamba2_mix_fwd", "dualscan::mamba2_mix_bwd"} <= {event.name for event in profile.events() or ()}


@pytest.mark.parametrize("more", [0, 7])
def test_the_operator_is_traced_whole(more: int) -> None:
    made = layer(torch.float32)
    zxbcdt = spaced(torch.randn(1, 5, made.in_proj.out_features, device=DEVICE), more).requires_grad_()

    def loss(zxbcdt: Tensor) -> Tensor:
        return fused(made, zxbcdt, None, None).y.square().sum()

    leaves = [zxbcdt, made.A_log, made.conv1d.weight]
    expected = torch.autograd.grad(loss(zxbcdt), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(zxbcdt), leaves)
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(got, expected, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("recompute", ["none", "convolution", "activations", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_takes_it(dtype: torch.dtype, recompute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Mamba2(128, headdim=64, d_state=64, recompute=recompute).cuda().to(dtype)
    u = torch.randn(2, 128, 128, device="cuda", dtype=dtype, requires_grad=True)
    calls = []
    mix = mixer.mix
    monkeypatch.setattr(mixer, "mix", lambda *args, **options: calls.append(1) or mix(*args, **options))
    y, state = made(u)
    assert calls
    leaves = [u, *made.parameters()]
    grads = torch.autograd.grad((y.sum() + state.ssm.sum()), leaves)
    count = len(calls)
    made.impl = "chunked"
    same, same_state = made(u)
    assert len(calls) == count
    expected = torch.autograd.grad((same.sum() + same_state.ssm.sum()), leaves)
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    for got, wanted in zip((y, *grads), (same, *expected), strict=True):
        assert (got.double() - wanted.double()).norm() <= limit * wanted.double().norm()


@pytest.mark.cuda
def test_compiles_to_one_graph() -> None:
    made = Mamba2(128, headdim=64, d_state=64).cuda()
    u = torch.randn(2, 128, 128, device="cuda", requires_grad=True)

    def loss(u: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return made(u)[0].float().square().mean()

    expected = torch.autograd.grad(loss(u), [u, *made.parameters()])
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(u), [u, *made.parameters()])
    for ours, wanted in zip(got, expected, strict=True):
        assert (ours - wanted).norm() <= 2e-2 * wanted.norm()
