"""Parameters that stay float32 under casts, and projections of one row."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dualscan.nn.attention import Attention
from dualscan.nn.mamba import Mamba
from dualscan.nn.mamba2 import Mamba2
from dualscan.nn.mlp import MLP
from dualscan.nn.precision import Float32Parameters, Product, _widened, apply_linear, project
from tests.oracle import assert_close

EXACT = ("A_log", "dt_bias", "D", "norm.weight")


def layer() -> nn.Module:
    block = Mamba2(24, d_state=10, headdim=12, bias=True)
    with torch.no_grad():
        for p in block.parameters():
            p.uniform_(0.1, 1.0)
    return nn.ModuleDict({"inner": nn.Sequential(block)})


CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "bfloat16()": (lambda m: m.bfloat16(), torch.bfloat16),
    "half()": (lambda m: m.half(), torch.float16),
    "to(dtype)": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to(device, dtype)": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "to(tensor)": (lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)), torch.bfloat16),
    "type()": (lambda m: m.type(torch.bfloat16), torch.bfloat16),
    "twice": (lambda m: m.half().bfloat16(), torch.bfloat16),
    "there and back": (lambda m: m.bfloat16().float(), torch.float32),
    "after a copy": (lambda m: copy.deepcopy(m).bfloat16(), torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_leave_them_exact(cast: str) -> None:
    function, dtype = CASTS[cast]
    model = layer()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in function(model).named_parameters():
        if name.endswith(EXACT):
            assert p.dtype == torch.float32, name
            assert torch.equal(p, before[name]), name
        else:
            assert p.dtype == dtype, name
        assert isinstance(p, nn.Parameter)
        assert p.requires_grad


def test_float64_and_devices_act_as_usual() -> None:
    model = layer().double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model.bfloat16()
    kept = {name: p.dtype for name, p in model.named_parameters() if name.endswith(EXACT)}
    assert set(kept.values()) == {torch.float64}
    model = layer().to("meta", torch.bfloat16)
    for name, p in model.named_parameters():
        assert p.device.type == "meta"
        assert p.dtype == (torch.float32 if name.endswith(EXACT) else torch.bfloat16), name


def test_a_cast_keeps_the_parameter_objects_and_their_optimizer() -> None:
    model = layer()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    model.bfloat16()
    for name, p in model.named_parameters():
        assert p is parameters[name]
        assert p.grad is not None
        assert p.grad.dtype == p.dtype, name
        assert torch.equal(p.grad, torch.ones_like(p))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name


def test_a_parameter_may_be_absent() -> None:
    class Partial(Float32Parameters):
        float32_parameters = ("weight", "bias")

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(3)), None

    model = Partial().bfloat16()
    assert model.weight.dtype == torch.float32
    assert model.bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_projections_of_one_row_equal_the_general_one(dtype: torch.dtype, bias: bool) -> None:
    weight, offset = torch.randn(40, 300).to(dtype), torch.randn(40).to(dtype) if bias else None
    for shape in ((1, 1, 300), (300,), (2, 3, 300), (0, 300)):
        x = torch.randn(shape).to(dtype)
        exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
        with torch.no_grad():
            y = project(x, weight, offset)
        assert y.dtype == dtype
        assert_close(str(shape), y, exact, dtype=dtype, yardstick=F.linear(x, weight, offset))
        assert torch.equal(project(x, weight.requires_grad_(), offset), F.linear(x, weight, offset))
        weight = weight.detach()


def test_projections_follow_autocast() -> None:
    x, weight = torch.randn(1, 1, 30), torch.randn(4, 30)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert project(x, weight).dtype == torch.bfloat16


class Adapted(nn.Module):
    """A projection with a low-rank adapter beside it, as fine-tuning libraries put in its place."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        plain = copy.deepcopy(self.base)
        with torch.no_grad():
            plain.weight += self.up.weight @ self.down.weight
        return plain


MIXERS: dict[str, Callable[[], nn.Module]] = {
    "mamba2": lambda: Mamba2(24, d_state=10, headdim=12, bias=True),
    "mamba": lambda: Mamba(24, d_state=4, bias=True),
    "attention": lambda: Attention(24, 2),
    "mlp": lambda: MLP(24),
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_module_in_the_place_of_a_projection_is_called(mixer: str) -> None:
    """Over a sequence and in a step after it: what adapters compute is what their merged weights compute."""
    adapted = MIXERS[mixer]()
    merged = copy.deepcopy(adapted)
    for name, module in list(adapted.named_children()):
        if isinstance(module, nn.Linear):
            adapter = Adapted(module)
            setattr(adapted, name, adapter)
            setattr(merged, name, adapter.merged())
    u = torch.randn(2, 6, 24)
    y, state = adapted(u[:, :5])
    y.sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in adapted.named_parameters() if "up.weight" in name)
    with torch.no_grad():
        expected, after = merged(u[:, :5])
        assert_close("sequence", y, expected, dtype=torch.float32)
        assert_close("step", adapted(u[:, 5:], state)[0], merged(u[:, 5:], after)[0], dtype=torch.float32)


def test_hooks_of_a_projection_run() -> None:
    projection = nn.Linear(4, 3)
    x = torch.randn(1, 4)
    with torch.no_grad():
        expected = 2 * projection(x)
        projection.register_forward_hook(lambda module, args, out: 2 * out)
        assert torch.equal(apply_linear(projection, x), expected)


def test_the_product_of_training_is_the_linear_map():
    """The gradient of the float32 weight is of the rounded operands, and itself not rounded."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8).bfloat16().requires_grad_()
    weight = torch.randn(5, 8, requires_grad=True)
    dy = torch.randn(2, 3, 5).bfloat16()
    y = Product.apply(x, weight)
    assert torch.equal(y, F.linear(x, weight.bfloat16()))
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    assert dweight.dtype == torch.float32
    torch.testing.assert_close(dweight, dy.double().flatten(0, 1).t().mm(x.double().flatten(0, 1)).float())
    torch.testing.assert_close(dx, (dy.double() @ weight.bfloat16().double()).bfloat16())


@pytest.mark.parametrize("spaced", [False, True], ids=["dense gradient", "spaced gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_columns_change_nothing(dtype: torch.dtype, spaced: bool) -> None:
    """Whatever lies between the rows, NaN here, of y and of its gradient."""
    x = torch.randn(2, 3, 8).to(dtype).requires_grad_()
    weight = nn.Parameter(torch.randn(5, 8))
    dy = torch.full((2, 3, 16 if spaced else 5), torch.nan, dtype=dtype)[..., :5]
    dy.normal_()
    y = Product.apply(x, weight, 16)
    assert (y.shape, y.stride()) == ((2, 3, 5), (48, 16, 1))
    expected = Product.apply(x, weight)
    torch.testing.assert_close(y, expected)
    grads, wanted = ([], [])
    for out, found in ((y, grads), (expected, wanted)):
        x.grad = weight.grad = None
        out.backward(dy)
        found += [x.grad, weight.grad]
    assert weight.grad is not None
    assert weight.grad.is_contiguous()
    for got, grad in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, grad)


def test_a_gradient_at_the_end_of_its_memory_is_not_widened() -> None:
    rows = torch.randn(3 * 16 - 1)
    assert _widened(rows.as_strided((3, 5), (16, 1)), 16).shape == (3, 5)
    assert _widened(rows.as_strided((2, 5), (16, 1), 15), 16).shape == (2, 16)
    assert _widened(rows.view(-1)[:15].view(3, 5), 16).shape == (3, 5)
