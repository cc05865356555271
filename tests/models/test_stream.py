"""The residual stream with layers' outputs that wait for the next norm, as on a GPU, against sums at once."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dualscan.models import lm
from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM
from dualscan.nn import block as blocks
from dualscan.nn.block import set_recompute
from dualscan.nn.norm import adds_in_norms
from tests.nn.test_recompute import Alive
from tests.oracle import assert_close
from tests.strategies import packed

EXPERTS = {"n_experts": 3, "experts_per_token": 2, "d_expert": 16}
MODELS: dict[str, dict[str, Any]] = {
    "mamba2": {"pattern": "MM"},
    "mlp": {"pattern": "--"},
    "mamba": {"pattern": "mM", "tie_embeddings": False},
    "hybrid": {"pattern": "M*-P"},
    "experts": {"pattern": "ME", **EXPERTS},
    "scaled": {"pattern": "M-M", "residual_scale": 0.3, "mlp_scale": 0.5, "logits_scale": 0.7, "embedding_scale": 2.0},
    "shared": {"pattern": "MSMS", "n_shared": 1, "adapter_rank": 2, "mlp_activation": "geglu"},
}
TOGETHER = "dualscan.add_rms_norm_fwd.default"


def model_of(name: str) -> MambaLM:
    sizes = {"d_model": 24, "vocab_size": 32, "d_state": 10, "headdim": 12, "n_heads": 2, "embedding_std": 1.0}
    return MambaLM(ModelConfig(**{**sizes, **MODELS[name]}))


def text(batch: int = 2, seqlen: int = 13) -> Tensor:
    return torch.randint(32, (batch, seqlen))


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[False, True], ids=["at once", "late"])
def late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    monkeypatch.setattr(blocks, "adds_in_norms", lambda h: request.param)
    return request.param


def both(monkeypatch: pytest.MonkeyPatch, run: Any) -> tuple[Any, Any]:
    """What a computation gives with sums at once, and with sums that wait."""
    results = []
    for wait in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "adds_in_norms", lambda h, wait=wait: wait)
            results.append(run())
    return results[0], results[1]


def gradients(model: MambaLM, tokens: Tensor, **options: Any) -> dict[str, Tensor]:
    loss = model.loss(tokens, tokens, **options)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [model.get_parameter(name) for name in names], allow_unused=True)
    found = {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}
    return {"loss": loss.detach(), **found}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_a_cpu_adds_at_once() -> None:
    assert not adds_in_norms(torch.ones(2, 3))
    with Calls() as calls:
        model_of("hybrid")(text())
    assert calls.count[TOGETHER] == 0


def test_every_sum_waits_for_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first norm has nothing to add; the last layer's output is added by the last norm."""
    monkeypatch.setattr(blocks, "adds_in_norms", lambda h: True)
    with Calls() as calls:
        model_of("hybrid")(text())
    assert calls.count[TOGETHER] == 4 + 1
    assert calls.count["dualscan.rms_norm_fwd.default"] == 2  # those within the Mamba-2 layers


# What bfloat16 may change is in these: sums of several products' gradients, factors, and neither.
FEW = ["mamba2", "hybrid", "scaled"]


@pytest.mark.parametrize(("name", "autocast"), [(name, False) for name in MODELS] + [(name, True) for name in FEW])
def test_gradients_are_the_same(name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of(name), text()

    def run() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return gradients(model, tokens)

    at_once, late = both(monkeypatch, run)
    if not autocast:
        assert_same(at_once, late)
    for key, value in late.items():
        # The norm comes in bfloat16, where the products of attention and MLPs add up their gradients of it.
        assert_close(key, value, at_once[key].double(), dtype=torch.bfloat16, gradient=True)


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, torch.float32) for name in MODELS] + [(name, torch.bfloat16) for name in FEW], ids=str
)
def test_values_are_the_same_bits(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a whole, in two parts with the state between, and for the last tokens alone."""
    model, tokens = model_of(name).to(dtype), text()
    monkeypatch.setattr(lm, "project_normed", lambda *_: None)  # a CPU's own end of a step, which rounds less

    def run() -> list[Tensor]:
        first, state = model(tokens[:, :8])
        second = model(tokens[:, 8:], state=state, logits_to_keep=2)
        hidden = model.hidden_states(tokens)
        return [leaf for leaf in tree_leaves((first, state, second, hidden)) if isinstance(leaf, Tensor)]

    with torch.inference_mode():
        for one, other in zip(*both(monkeypatch, run), strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype


def test_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, cu_seqlens = model_of("hybrid"), text(1), packed([3, 9, 1])
    assert_same(*both(monkeypatch, lambda: gradients(model, tokens, cu_seqlens=cu_seqlens)))


@pytest.mark.parametrize("name", ["mamba2", "hybrid", "scaled", "shared"])
def test_recomputing_gives_the_same_bits(name: str, late: bool) -> None:
    model, tokens, found = model_of(name), text(), {}
    for mode in ("none", "convolution", "activations", "block"):
        set_recompute(model, mode)
        found[mode] = gradients(model, tokens)
        assert_same(found["none"], found[mode])


def test_recomputing_keeps_as_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether sums wait or not, the graph holds the stream once a layer, and what a mode keeps beside."""
    model, tokens = model_of("mamba2"), text(2, 64)

    def kept(mode: str) -> int:
        set_recompute(model, mode)
        with Alive() as alive:
            loss = model.hidden_states(tokens)[0].sum()
        before = alive.bytes()
        loss.backward()
        return before - alive.bytes()

    for mode in ("none", "convolution", "activations", "block"):
        model.zero_grad()
        gradients(model, tokens)
        at_once, waiting = both(monkeypatch, lambda mode=mode: kept(mode))
        assert waiting <= at_once, mode
    set_recompute(model, "activations")
    assert kept("activations") < 0.8 * kept("none")


def test_hooks_see_what_they_always_saw(late: bool) -> None:
    """A block with a hook is called, with the whole sum; so is a norm, in a block that is not."""
    model, tokens, seen = model_of("hybrid"), text(), {}
    expected = model(tokens).logits
    streams = [model.embedding(tokens)]
    for block in model.layers:
        streams.append(block(streams[-1])[0])
    model.layers[1].register_forward_hook(lambda m, args, out: seen.update(block=(args[0], out[0])))
    norm = model.layers[2].get_submodule("norm")
    norm.register_forward_hook(lambda m, args, out: seen.update(norm=(args[0], out)))
    model.norm_f.register_forward_pre_hook(lambda m, args: seen.update(last=args))
    assert torch.equal(model(tokens).logits, expected)
    assert torch.equal(seen["block"][0], streams[1])
    assert torch.equal(seen["block"][1], streams[2])
    assert torch.equal(seen["norm"][0], streams[2])
    assert torch.equal(seen["norm"][1], norm(streams[2]))
    assert torch.equal(seen["last"][0], streams[4])


def test_a_block_of_another_kind_is_called(late: bool) -> None:
    """One whose `forward` was replaced, on it or by its class, does what that says."""

    class Silent(blocks.Block):
        def forward(self, h: Tensor, state: Any = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
            return h, None

    model, tokens = model_of("mamba2"), text()
    alone = model_of("mamba2")
    alone.load_state_dict(model.state_dict())
    del alone.layers[1]
    expected = alone.hidden_states(tokens)[0]
    second = model.layers[1]
    second.forward = lambda h, state=None, cu_seqlens=None: (h, None)
    assert torch.equal(model.hidden_states(tokens)[0], expected)
    del second.forward
    second.__class__ = Silent
    assert torch.equal(model.hidden_states(tokens)[0], expected)


@pytest.mark.parametrize(("recompute", "autocast"), [("none", False), ("activations", True)])
def test_compiles_in_one_piece(recompute: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(blocks, "adds_in_norms", lambda h: True)
    model, tokens = model_of("mamba2"), text()
    set_recompute(model, recompute)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = gradients(model, tokens)
        grads = torch.autograd.grad(compiled(tokens, tokens), list(model.parameters()))
    dtype = torch.bfloat16 if autocast else torch.float32
    for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
        assert_close(name, grad, expected[name].double(), dtype=dtype, gradient=True)


@pytest.mark.cuda
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu(name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels add up rows in another order than those of a norm alone; all else is the same."""
    model, tokens = model_of(name).cuda(), text().cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        with Calls() as calls:
            found = gradients(model, tokens)
        assert calls.count[TOGETHER] > 0
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "adds_in_norms", lambda h: False)
            expected = gradients(model, tokens)
        for key, value in found.items():
            assert_close(key, value, expected[key].double(), dtype=torch.bfloat16, gradient=True)
        if name == "mlp":  # the others have operators that take other kernels or do not repeat bitwise
            set_recompute(model, "activations")
            assert_same(gradients(model, tokens), found)
