"""The machine's side of a run: which device, which precision and why, and signals that end a run at a step's end."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from dualscan.train.config import Precision


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU if there is one (CUDA, then Apple's), else the CPU.

    Raises:
        ValueError: an unknown name, or a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name!r} cannot be used ({reason}); use 'auto', 'cpu', 'cuda' or 'mps'.") from error
    return device


class ComputePrecision(NamedTuple):
    """The dtype of matrix products, and why in words."""

    dtype: torch.dtype
    why: str


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has a matrix unit for bf16 (AMX), which is where autocast pays; others convert back and forth."""
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return torch.cpu._is_amx_tile_supported()  # before torch 2.13


def pick_precision(precision: Precision, device: torch.device) -> ComputePrecision:
    """The dtype that autocast runs matrix products in; weights, decays, states and norms stay float32.

    Args:
        precision: "fp32" and "bf16" are honoured; "auto" decides by the device.
        device: where the model is.
    """
    if precision != "auto":
        return ComputePrecision(torch.float32 if precision == "fp32" else torch.bfloat16, "as asked for")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return ComputePrecision(torch.bfloat16, "the GPU multiplies bf16 matrices faster")
        return ComputePrecision(torch.float32, "the GPU has no bf16 matrix unit")
    if device.type == "cpu":
        if cpu_multiplies_bf16():
            return ComputePrecision(torch.bfloat16, "the CPU has a bf16 matrix unit (AMX)")
        return ComputePrecision(torch.float32, "the CPU has no bf16 matrix unit (AMX)")
    return ComputePrecision(torch.float32, f"bf16 is not tested on {device.type}")


def autocast(device: torch.device, precision: ComputePrecision) -> torch.autocast:
    """The context in which a model runs in the chosen precision."""
    enabled = precision.dtype != torch.float32
    return torch.autocast(device.type, dtype=precision.dtype if enabled else None, enabled=enabled)


def bar_interval() -> float:
    """Seconds between two drawings of a progress bar: rare where every one becomes a line of a log file."""
    return 0.5 if sys.stderr.isatty() else 20.0


class StopSignals:
    """Turns the first Ctrl-C (SIGINT) or SIGTERM into a request to stop; a second Ctrl-C interrupts at once.

    A context manager. Outside the main thread, where Python allows no handlers, it does nothing.

    Attributes:
        requested: the name of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def sent(t: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a GPU fetches it from pinned memory when it gets there."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not t.is_cuda else t.to(device)
