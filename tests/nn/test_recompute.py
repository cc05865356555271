"""Computing again instead of keeping: the same bits, in less memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM
from dualscan.nn.block import Block, set_recompute
from dualscan.nn.mamba2 import Mamba2, Mamba2State
from dualscan.ops._recompute import recomputed
from tests.strategies import packed

MODES = ("none", "activations", "block")
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "groups, bias, norm first": {"ngroups": 2, "bias": True, "norm_before_gate": True},
    "no norm": {"gated_norm": False},
    "no bias in the convolution": {"conv_bias": False, "d_conv": 2},
    "heads and features": {"head_pattern": "multi-query", "feature_map": "silu+taylor", "d_state": 3},
    "scales": {"projection_scales": (0.5, 2.0, 1.0, 1.0, 0.7)},
}


class Alive(TorchDispatchMode):
    """Counts the memory that operations made and that is still in use."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return results

    def bytes(self) -> int:
        return sum(size for storage, size in self._made.values() if not storage.expired())


def layer(dtype: torch.dtype = torch.float32, **options: Any) -> Mamba2:
    return Mamba2(24, **{"d_state": 10, "headdim": 12, **options}).to(dtype)


def gradients(module: nn.Module, run: Callable[[], Tensor], **others: Tensor) -> dict[str, Tensor]:
    """Of the parameters and of other leaves."""
    leaves = {**dict(module.named_parameters()), **others}
    grads = torch.autograd.grad(run(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_the_same_bits(options: str, autocast: bool) -> None:
    block, u = layer(**OPTIONS[options]), torch.randn(2, 37, 24, requires_grad=True)
    weights = torch.randn(2, 37, 24)

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return (block(u)[0] * weights).sum()

    found = {}
    for block.recompute in MODES:
        found[block.recompute] = gradients(block, run, u=u)
    for mode in MODES[1:]:
        for name, expected in found["none"].items():
            assert torch.equal(found[mode][name], expected), (mode, name)


def test_states_and_packed_sequences_too() -> None:
    block, cu_seqlens = layer(), packed([3, 0, 19, 1])
    u = torch.randn(1, 23, 24)
    conv = torch.randn(4, block.conv1d.in_channels, 3, requires_grad=True)
    ssm = torch.randn(4, block.nheads, 12, 10, requires_grad=True)

    def run() -> Tensor:
        y, state = block(u, Mamba2State(conv, ssm), cu_seqlens)
        return y.square().sum() + state.conv.square().sum() + state.ssm.square().sum()

    found = {}
    for block.recompute in MODES:
        found[block.recompute] = gradients(block, run, conv=conv, ssm=ssm)
    for mode in MODES[1:]:
        for name, expected in found["none"].items():
            assert torch.equal(found[mode][name], expected), (mode, name)


@pytest.mark.parametrize("pattern", ["MM", "M*-", "mP"])
def test_models_of_any_layers(pattern: str) -> None:
    config = ModelConfig(d_model=24, pattern=pattern, vocab_size=32, d_state=10, headdim=12, n_heads=2)
    model, tokens = MambaLM(config), torch.randint(32, (2, 19))
    found = {}
    for mode in MODES:
        set_recompute(model, mode)
        found[mode] = gradients(model, lambda: model.loss(tokens, tokens))
    for mode in MODES[1:]:
        for name, expected in found["none"].items():
            assert torch.equal(found[mode][name], expected), (mode, name)


def test_every_step_keeps_less() -> None:
    """A block's forward, by what it leaves in memory: the convolved channels and the norms' outputs, then all."""
    block, h = Block(24, layer()), torch.randn(2, 64, 24, requires_grad=True)
    kept = {}
    for mode in MODES:
        set_recompute(block, mode)
        with Alive() as alive:
            y = block(h)[0]
        before = alive.bytes()
        y.sum().backward()
        kept[mode] = before - alive.bytes()  # views of parameters are there before and after
    mixer, rows = layer(), 2 * 64
    assert kept["none"] - kept["activations"] == 4 * rows * (mixer.conv1d.in_channels + mixer.d_inner + 24)
    assert kept["block"] < 0.1 * kept["none"]


def test_a_second_backward_of_one_graph() -> None:
    block, u = layer(recompute="activations"), torch.randn(2, 9, 24)
    y = block(u)[0].square().sum()
    first = torch.autograd.grad(y, list(block.parameters()), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y, list(block.parameters())), strict=True):
        assert torch.equal(a, b)


def test_frozen_parameters() -> None:
    block, u = layer(recompute="activations"), torch.randn(2, 9, 24, requires_grad=True)
    (expected,) = torch.autograd.grad(block(u)[0].sum(), u)
    block.requires_grad_(False)
    (actual,) = torch.autograd.grad(block(u)[0].sum(), u)
    assert torch.equal(actual, expected)


@contextmanager
def counting() -> Iterator[list[int]]:
    seen = [0]

    def pack(t: Tensor) -> Tensor:
        seen[0] += t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield seen


def test_hooks_of_the_caller_go_first() -> None:
    """Inside a checkpoint of the caller nothing is held beside it; other hooks see every tensor."""
    block, u = layer(), torch.randn(2, 9, 24)
    with counting() as plain:
        block(u)
    expected = gradients(block, lambda: block(u)[0].sum())
    block.recompute = "activations"
    with counting() as seen:
        block(u)
    assert seen == plain
    actual = gradients(block, lambda: checkpoint(block, u, use_reentrant=False)[0].sum())
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_recipes_within_recipes_and_views() -> None:
    x = torch.randn(6, requires_grad=True)
    y, z = x.exp(), x.sin()
    calls = []

    def again(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: (calls.append(name), function(x))[1]

    with recomputed(y, again("y", torch.exp)), recomputed(z, again("z", torch.sin)):
        total = (y[2:] * z[:4]).sum() + y.square().sum()
    (grad,) = torch.autograd.grad(total, x)
    wide = x.detach().double().requires_grad_()
    expected = (wide.exp()[2:] * wide.sin()[:4]).sum() + wide.exp().square().sum()
    torch.testing.assert_close(grad.double(), torch.autograd.grad(expected, wide)[0], rtol=1e-6, atol=1e-6)
    assert sorted(calls) == ["y", "z"]


def test_without_gradients_nothing_is_planned() -> None:
    block, u = layer(), torch.randn(2, 9, 24)
    with torch.no_grad():
        expected = block(u)[0]
        for block.recompute in MODES[1:]:
            assert torch.equal(block(u)[0], expected)


@pytest.mark.parametrize("recompute", MODES)
def test_compiles_in_one_piece(recompute: str) -> None:
    block, h = Block(24, layer()), torch.randn(2, 9, 24)
    expected = gradients(block, lambda: block(h)[0].sum())
    set_recompute(block, recompute)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    actual = gradients(block, lambda: compiled(h)[0].sum())
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6)


def test_an_unknown_value_is_named() -> None:
    for make in (lambda: layer(recompute="all"), lambda: set_recompute(layer(), "all")):
        with pytest.raises(ValueError, match=r"recompute='all' is unknown; use 'none' .*'activations' .*'block'"):
            make()
