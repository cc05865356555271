"""An emulator of Gluon on the CPU, for what the kernels use: Triton's interpreter does not know Gluon.

`run` executes the Python function behind a kernel, program by program, with Gluon's functions replaced by those of this
folder. Values are computed by PyTorch. What is asynchronous on the GPU is as late as the program allows, and a program
that relies on more raises `Hazard`. Plain Triton kernels run too, in every dtype.
"""

import functools
import inspect
import itertools
import types
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from tests.gluon import language, plain
from tests.gluon.memory import Descriptor, Launch, Pointer
from tests.gluon.nvidia import async_copy, hopper, mbarrier, tma
from tests.gluon.shared import Program
from tests.gluon.values import Hazard, Value, value

__all__ = ["Hazard", "run"]

NVIDIA = "triton.experimental.gluon.language.nvidia"
# Of Triton's modules, the longest name that begins one's own counts.
EMULATED = {
    "triton.language": plain,
    "triton.experimental.gluon.language": language,
    f"{NVIDIA}.hopper": hopper,
    f"{NVIDIA}.hopper.tma": tma,
    f"{NVIDIA}.hopper.mbarrier": mbarrier,
    f"{NVIDIA}.ampere": hopper,
    f"{NVIDIA}.ampere.mbarrier": mbarrier,
    f"{NVIDIA}.ampere.async_copy": async_copy,
}
LAUNCH_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg"}


def run(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **constants: Any) -> None:
    """Runs `kernel[grid](*arguments, **constants)`, with tensors on the CPU."""
    function = Translation().function(kernel.fn if hasattr(kernel, "fn") else kernel)
    parameters = inspect.signature(function).parameters
    options = {name: constants[name] for name in LAUNCH_OPTIONS & constants.keys() if name not in parameters}
    if options.get("num_ctas", 1) != 1:
        raise NotImplementedError("the emulator has no clusters")
    grid = (*grid, 1, 1)[:3]
    launch = Launch(grid, constants.get("num_warps", 4))
    bound = inspect.signature(function).bind(*arguments, **{k: v for k, v in constants.items() if k not in options})
    bound.apply_defaults()
    values = {name: x if is_constant(parameters[name]) else argument(x, launch) for name, x in bound.arguments.items()}
    for number, place in enumerate(itertools.product(*(range(size) for size in reversed(grid)))):
        launch.program, Program.running = number, Program(launch, place[::-1])
        try:
            function(**values)
            Program.running.finish()
        except Exception as error:
            error.add_note(f"in program {place[::-1]} of {function.__name__}")
            raise
        finally:
            del Program.running


def argument(x: Any, launch: Launch) -> Any:
    """What a kernel receives for an argument of the launch."""
    if isinstance(x, Tensor):
        return Pointer.to(x, launch)
    if isinstance(x, bool | int | float):
        return value(x)
    if isinstance(x, tuple):
        return tuple(argument(item, launch) for item in x)
    return Descriptor(x, launch) if hasattr(x, "block_shape") else x


def is_constant(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is annotated as `gl.constexpr`."""
    annotation = parameter.annotation
    return getattr(annotation, "__name__", str(annotation)).endswith("constexpr")


class Namespace:
    """One of Triton's modules: what is emulated, and of the rest only dtypes and layouts."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = emulated(self._name, name)
        setattr(self, name, found)
        return found


def emulated(module: str, name: str) -> Any:
    """The emulator's object for one of Triton's."""
    known = max((prefix for prefix in EMULATED if f"{module}.".startswith(f"{prefix}.")), key=len, default="")
    for ours in (EMULATED[known], language) if known else ():
        found = vars(ours).get(name)
        if getattr(found, "__module__", "") == ours.__name__ and not name.startswith("_"):
            return found
    real = getattr(import_module(module), name, None)
    if isinstance(real, types.ModuleType):
        return Namespace(real.__name__)
    if real is not None and (isinstance(real, type) or type(real).__name__ == "dtype"):
        return real
    raise NotImplementedError(f"the emulator has no {module}.{name}")


class Translation:
    """Copies of functions that see the emulator where they named Triton."""

    def __init__(self) -> None:
        self._functions: dict[int, Callable[..., Any]] = {}
        self._globals: dict[int, dict[str, Any]] = {}

    def function(self, original: types.FunctionType) -> Callable[..., Any]:
        known = self._functions.get(id(original))
        if known is not None:
            return known
        copy = types.FunctionType(
            original.__code__, self._namespace(original.__globals__), original.__name__,
            tuple(self.object(x) for x in original.__defaults__ or ()),
            tuple(types.CellType(self.object(cell.cell_contents)) for cell in original.__closure__ or ()),
        )  # fmt: skip
        copy.__annotations__ = original.__annotations__
        signature = inspect.signature(copy)
        constants = [name for name, parameter in signature.parameters.items() if is_constant(parameter)]

        @functools.wraps(copy)
        def checked(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs).arguments
            for name in constants:
                if isinstance(bound.get(name), Value):
                    raise TypeError(f"{name} of {copy.__name__} is a constexpr: a value of the kernel is none")
            return copy(*args, **kwargs)

        self._functions[id(original)] = checked
        return checked

    def _namespace(self, original: dict[str, Any]) -> dict[str, Any]:
        known = self._globals.get(id(original))
        if known is None:
            known = self._globals[id(original)] = {}
            known.update({name: self.object(x) for name, x in original.items()}, range=language.range)
        return known

    def object(self, original: Any) -> Any:
        """The object itself, unless it is Triton's or a function for Triton."""
        module = getattr(type(original), "__module__", "")
        if isinstance(original, types.ModuleType):
            return Namespace(original.__name__) if original.__name__ in EMULATED else original
        if isinstance(original, types.FunctionType) and original.__module__.startswith("triton."):
            return self._stand_in(original)
        if module.startswith("triton."):
            if type(original).__name__ == "constexpr":
                return original.value
            if isinstance(getattr(original, "fn", None), types.FunctionType):
                theirs = original.fn.__module__.startswith("triton.")
                return self._stand_in(original.fn) if theirs else self.function(original.fn)
        return original

    def _stand_in(self, original: Any) -> Any:
        try:
            return emulated(original.__module__, original.__name__)
        except NotImplementedError as error:
            return _refusal(str(error))


def _refusal(message: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(message)

    return refuse
