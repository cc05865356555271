"""Launchers are replayed: the same kernels on the same memory, and the launcher itself where that is not sure."""

import ctypes
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from dualscan.ops import _launch, _triton
from dualscan.ops._launch import replay
from tests import gluon
from tests.ops.ssd.test_triton import elsewhere, on_device
from tests.oracle import assert_close
from tests.strategies import evaluate, ssd_problem

pytest.importorskip("triton")


def tensor_at(address: int, like: Tensor) -> Tensor:
    """The memory at an address as a tensor."""
    if like.numel() == 0:
        return like
    elements = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    memory = (ctypes.c_char * (elements * like.element_size())).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(like.dtype).as_strided(like.shape, like.stride())


class Kernel:
    """A kernel as Triton would have compiled it: from addresses and numbers to the emulator."""

    def __init__(self, kernel: Any, arguments: Sequence[Any], constants: int, options: dict[str, Any]) -> None:
        self.kernel, self.options = kernel, options
        own = len(arguments) - constants
        self.arguments, self.constants = arguments[:own], arguments[own:]

    @_disable_current_modes()  # what the emulator computes is no operation of the call
    def __call__(self, x: int, y: int, z: int, stream: int, *arguments: Any) -> None:
        assert stream == STREAM
        given, rebuilt = list(arguments), []
        for like in self.arguments:
            a = given.pop(0)
            if hasattr(like, "block_shape"):
                address, make, more = a
                assert [given.pop(0) for _ in range(2 * len(like.shape))] == [*like.shape, *like.strides]
                a = object.__new__(make)
                a.__dict__.update(more, base=tensor_at(address, like.base))
            elif isinstance(a, int) and isinstance(like, Tensor):
                a = tensor_at(a, like)
            rebuilt.append(a)
        assert given == [None] * len(given)
        gluon.run(self.kernel, (x, y, z), (*rebuilt, *self.constants), **self.options)


STREAM = 7


def encode(descriptor: Any) -> list[Any]:
    more = {name: value for name, value in vars(descriptor).items() if name != "base"}
    encoded = (descriptor.base.data_ptr(), type(descriptor), more)
    return [encoded, *descriptor.shape, *descriptor.strides]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for Hopper GPUs, started as on one, in the emulator of Gluon."""
    from dualscan.ops.ssd import configs, triton_scan

    if not _triton.interpreted():
        pytest.skip("there is a GPU: what is launched is compiled")

    def first_launch(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], **options: Any) -> Any:
        if _launch._THREAD.watcher is not None:
            _launch._THREAD.watcher.spoil("first")
        gluon.run(kernel, grid, tuple(arguments), **options)
        return SimpleNamespace(kernel=kernel, arguments=arguments, options=options)

    def started(compiled: Any, constants: int) -> _launch.Started:
        kernel = Kernel(compiled.kernel, compiled.arguments, constants, compiled.options)
        places = [i for i, a in enumerate(kernel.arguments) if hasattr(a, "block_shape")]
        described = [(place, str(place), encode) for place in reversed(places)]
        return _launch.Started(kernel, (), constants, described, lambda: STREAM)

    known: dict[Any, _launch.Started] = {}

    def again(self: Any, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **constants: Any) -> None:
        if self.start is None:
            self.start = started(first_launch(kernel, grid, arguments, **constants), 0)
        else:
            self.start(grid, arguments)

    def found(self: Any, grid: Any, tensors: Any, sizes: Any, constants: Any, warps: int, *_: Any) -> None:
        key = self.kernel, constants, warps, *(t is None for t in tensors)
        if key in known:
            known[key](grid, (*tensors, *sizes))
        else:
            compiled = first_launch(self.kernel, grid, (*tensors, *sizes, *constants), num_warps=warps)
            known[key] = started(compiled, len(constants))

    monkeypatch.setattr(_launch.Launcher, "__call__", found)
    monkeypatch.setattr(_triton.Launcher, "__call__", again)

    def empty(*size: Any, **options: Any) -> Tensor:
        t = torch._C._VariableFunctions.empty(*size, **options)
        return t.fill_(255) if t.dtype == torch.uint8 else t  # NaN in every dtype

    # Not poisoned where it is made, which would be an operation of the call, but as a replay's scratch memory.
    monkeypatch.setattr(torch, "empty", empty)
    for name in ("empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, getattr(torch._C._VariableFunctions, name))
    monkeypatch.setattr(_launch, "_ENCODED", {})
    monkeypatch.setattr(configs, "on_hopper", lambda _: True)
    monkeypatch.setattr(configs, "HOPPER_EVERY", 2)
    monkeypatch.setattr(triton_scan, "_FAMILIES", {})
    monkeypatch.setattr(replay, "_device", lambda args: 0)
    monkeypatch.setattr(replay, "_PROGRAMS", {})


def forms() -> list[Any]:
    return [program if isinstance(program, bool) else type(program) for program in replay._PROGRAMS.values()]


SMALL: dict[str, Any] = {"batch": 1, "seqlen": 130, "nheads": 2, "ngroups": 1, "headdim": 64, "d_state": 64}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"D": "scalar", "dt_bias": True, "states": True, "batch": 2},
    "vector D": {"D": "vector"},
    "plain kernels": {"d_state": 16, "headdim": 32, "D": "scalar", "dt_bias": True},
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of SSD's launchers, as they are called."""
    from dualscan.ops.ssd import triton_gradients, triton_scan

    names: list[str] = []

    def count(module: Any, name: str) -> None:
        launcher = getattr(module, name)

        def counted(*args: Any, **more: Any) -> Any:
            names.append(name)
            return launcher(*args, **more)

        monkeypatch.setattr(module, name, counted)

    count(triton_scan, "forward")
    count(triton_gradients, "backward")
    return names


def assert_equal(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected:
        assert torch.equal(results[name], expected[name]), name


@pytest.mark.parametrize("case", CASES)
def test_ssd(case: str, emulated: None, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (ssd_problem(dtype=torch.bfloat16, **(SMALL | CASES[case])) for _ in range(2))
    plain, watched = (evaluate(one, impl="triton") for _ in range(2))
    assert forms() == [replay.Program, replay.Program]
    of_other, again = evaluate(other, impl="triton"), evaluate(one, impl="triton")
    assert calls == ["forward", "backward"] * 2
    monkeypatch.setattr(replay, "_PROGRAMS", {})
    assert_equal(of_other, evaluate(other, impl="triton"))
    assert_equal(watched, plain)
    assert_equal(again, plain)


def test_split_sequences(emulated: None, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a call lets go of on the way is used again."""
    from dualscan.ops.ssd import triton_scan

    monkeypatch.setattr(triton_scan, "_segment", lambda *_: 128)
    problem = ssd_problem(dtype=torch.bfloat16, **(SMALL | {"seqlen": 300}))
    results = [evaluate(problem, impl="triton") for _ in range(3)]
    assert len(calls) == 4
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


def test_inputs_in_one_memory(emulated: None, calls: list[str]) -> None:
    """Views of a projection, whose distance another call's need not have."""
    from dualscan.ops.ssd import ssd

    x, dt, A = torch.randn(1, 130, 2, 64).bfloat16(), torch.rand(1, 130, 2).bfloat16(), -torch.rand(2)
    for last in (1, 3, 2, 3):
        parts = torch.randn(1, 130, 256).bfloat16().unflatten(-1, (4, 1, 64)).unbind(2)
        inputs = x, dt, A, parts[0], parts[last]
        expected = ssd(*(t.double() for t in inputs), impl="recurrent").y
        assert_close("y", ssd(*inputs, impl="triton").y, expected, dtype=torch.bfloat16)
    assert forms() == [replay.Program]
    assert len(calls) == 2


def write(launch: Any, t: Tensor, value: float) -> None:
    """Starts a kernel that fills a float32 tensor."""
    launch((1, 1, 1), (t, t.numel(), value))


@pytest.fixture
def fill(emulated: None) -> _launch.Started:
    """A kernel as `started` gives it."""

    def kernel(x: int, y: int, z: int, stream: int, where: Any, count: int, value: float) -> None:
        with _disable_current_modes():
            address = where.data_ptr() if isinstance(where, Tensor) else where
            tensor_at(address, torch.empty(count)).fill_(value)

    return _launch.Started(kernel, (), 0, (), lambda: STREAM)


def calls_of(launcher: Any, *args: Any) -> tuple[list[Any], Any]:
    """What three calls return, and what the launcher's signature is known for then."""
    call = replay.replayed(launcher)
    results = [call(*args) for _ in range(3)]
    return results, forms()[-1]


def test_scratch_memory_is_one_block(fill: _launch.Started) -> None:
    """Views of it, an operator on it, and a result that is a view."""

    def launcher(x: Tensor, value: float) -> tuple[Tensor, Tensor]:
        first = torch.empty(2, 200, dtype=torch.float32)
        write(fill, first[1], value)
        del first
        second, third = torch.empty(100, dtype=torch.float32), torch.empty(2, 8, dtype=torch.float32)
        write(fill, second, value)
        write(fill, third, 2 * value)
        write(fill, third[1, 4:], 3 * value)
        return third.T[2:], x + third.sum()

    results, form = calls_of(launcher, torch.ones(3), 2.0)
    assert form is replay.Program
    for view, total in results:
        assert view.shape == (6, 2)
        assert view.stride() == (1, 8)
        assert view.tolist() == [[4.0, 4.0]] * 2 + [[4.0, 6.0]] * 4
        assert total.tolist() == [73.0] * 3
    assert results[1][0].data_ptr() != results[2][0].data_ptr()
    program = next(iter(replay._PROGRAMS.values()))
    assert isinstance(program, replay.Program)
    # The second lies where the first did, which was let go of.
    assert program.scratch == 2048
    assert program.tables == ()


def test_views_of_arguments(fill: _launch.Started) -> None:
    """Wherever in its memory an argument begins."""

    def launcher(x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.empty(2, dtype=torch.float32)
        write(fill, y, 1.0)
        return y, x[:, 1:] + 1

    call, memory = replay.replayed(launcher), torch.arange(40.0)
    for start in (0, 0, 0, 4, 8):
        x = memory[start:].as_strided((2, 3), (16, 1))
        assert torch.equal(call(x)[1], x[:, 1:] + 1)
    assert forms() == [replay.Program]


def test_other_signatures_are_other_programs(fill: _launch.Started) -> None:
    def launcher(x: Tensor, value: float) -> tuple[Tensor]:
        y = torch.empty(x.shape, dtype=torch.float32)
        write(fill, y, value)
        return (y,)

    call = replay.replayed(launcher)
    for x, value in ((torch.ones(4), 1.0), (torch.ones(4), 2.0), (torch.ones(2, 2), 1.0), (torch.ones(8)[::2], 1.0)):
        for _ in range(3):
            assert call(x, value)[0].shape == x.shape
            assert call(x, value)[0].mean() == value
    assert forms() == [replay.Program] * 4


@pytest.mark.parametrize("what", ["argument", "number", "memory", "integers", "twice", "list", "kernel"])
def test_what_is_left_to_the_launcher(what: str, fill: _launch.Started, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.zeros(2)

    def launcher(x: Tensor, *_: Tensor) -> Any:
        y = torch.empty(2, dtype=torch.float32)
        write(fill, y, 1.0)
        if what == "argument":
            return y, x
        if what == "number":
            y.mul_(x.sum().item())
        if what == "memory":
            write(fill, kept, 1.0)
        if what == "list":
            return (torch.cat([y, x]),)
        if what == "kernel" and _launch._THREAD.watcher is not None:
            _launch._start({(1, 1, 1): lambda *_: None}, (), (1, 1, 1), ())
        return (y,)

    x = torch.ones(2)
    args = {"integers": (x, torch.zeros(2, dtype=torch.int32)), "twice": (x, x)}.get(what, (x,))
    results, form = calls_of(launcher, *args)
    assert form is False
    assert all(torch.equal(t, results[0][0]) for t, *_ in results)


def test_no_tensor_is_kept(fill: _launch.Started) -> None:
    def launcher(x: Tensor) -> tuple[Tensor]:
        y = torch.empty(2, dtype=torch.float32)
        write(fill, y, 1.0)
        return (y + x,)

    x = torch.ones(2)
    memory = [StorageWeakRef(x.untyped_storage())]
    call = replay.replayed(launcher)
    for _ in range(4):
        memory.append(StorageWeakRef(call(x)[0].untyped_storage()))
    assert forms() == [replay.Program]
    del x
    assert all(ref.expired() for ref in memory)


def test_errors_are_the_launchers(fill: _launch.Started) -> None:
    def launcher(x: Tensor) -> tuple[Tensor]:
        raise RuntimeError("no memory")

    call = replay.replayed(launcher)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no memory"):
            call(torch.ones(2))
    assert _launch._THREAD.watcher is None
    assert forms() == [False]


@pytest.mark.cuda
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on another stream, and in a graph."""
    options = {"batch": 2, "seqlen": 500, "nheads": 4, "ngroups": 1, "headdim": 64, "d_state": 128}
    problem = on_device(ssd_problem(dtype=torch.bfloat16, D="scalar", dt_bias=True, states=True, **options))
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, getattr(torch._C._VariableFunctions, name))
    plain, watched = (evaluate(problem, impl="triton") for _ in range(2))
    assert_equal(watched, plain)
    assert forms() == [replay.Program, replay.Program]
    monkeypatch.setattr(replay, "recordable", lambda args: pytest.fail("another signature"))
    assert_equal(evaluate(problem, impl="triton"), plain)
    on_side, captured = elsewhere(problem)
    assert_equal(on_side, plain)
    assert_equal(captured, plain)


def test_packed_sequences_are_not_replayed(emulated: None, calls: list[str]) -> None:
    problem = ssd_problem(dtype=torch.bfloat16, **(SMALL | {"lengths": [70, 60]}))
    for _ in range(3):
        evaluate(problem, impl="triton")
    assert forms() == [False, False]
    assert calls == ["forward", "backward"] * 3


def test_mixer(emulated: None, calls: list[str]) -> None:
    """With operations of PyTorch, and gradients written into the columns of one."""
    from dualscan.ops import mixer

    batch, seqlen, nheads, headdim, d_state = 1, 70, 2, 64, 64
    d_inner, channels = nheads * headdim, nheads * headdim + 2 * d_state
    shapes = (channels, 1, 4), (channels,), (nheads,), (nheads,), (nheads,), (d_inner,)
    sizes = mixer.Sizes(1, 1)

    def run(inputs: list[Tensor], dy: Tensor) -> dict[str, Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        projected, weight, bias, A_log, dt_bias, D, norm_weight = leaves
        out = mixer.mix(projected, weight, bias, A_log, dt_bias, D, norm_weight, sizes)
        grads = torch.autograd.grad((out.y, out.ssm), leaves, (dy, torch.ones_like(out.ssm)))
        return {"y": out.y, "conv": out.conv, "ssm": out.ssm} | dict(zip("abcdefg", grads, strict=True))

    def random() -> tuple[list[Tensor], Tensor]:
        projected = torch.randn(batch, seqlen, d_inner + channels + nheads).bfloat16()
        return [projected, *(torch.randn(shape) / 2 for shape in shapes)], torch.randn(
            batch, seqlen, d_inner
        ).bfloat16()

    one, other = random(), random()
    plain = run(*one)
    expected = run(*other)
    assert len(calls) == 4
    assert forms() == [replay.Program, replay.Program]
    assert_equal(run(*one), plain)
    assert_equal(run(*other), expected)
    assert len(calls) == 4
