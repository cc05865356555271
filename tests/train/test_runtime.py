"""Devices, precision and signals."""

import os
import signal
import threading

import pytest
import torch

from dualscan.train import runtime
from dualscan.train.runtime import StopSignals, autocast, pick_device, pick_precision

CPU = torch.device("cpu")


def test_auto_takes_a_device_that_works():
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    assert pick_device("cpu") == CPU


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=rf"device='{name}' cannot be used .*use 'auto', 'cpu'"):
        pick_device(name)


def test_explicit_precision_is_honoured():
    assert pick_precision("fp32", CPU).dtype == torch.float32
    assert pick_precision("bf16", CPU).dtype == torch.bfloat16


@pytest.mark.parametrize(("amx", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_follows_the_matrix_unit(monkeypatch, amx, dtype):
    monkeypatch.setattr(runtime, "cpu_multiplies_bf16", lambda: amx)
    precision = pick_precision("auto", CPU)
    assert precision.dtype == dtype
    assert "AMX" in precision.why


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_multiplies_in_the_chosen_dtype(name, dtype):
    a = torch.randn(4, 4)
    with autocast(CPU, pick_precision(name, CPU)):
        assert (a @ a).dtype == dtype


def test_the_first_signal_asks_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        assert signals.requested is None
        signal.raise_signal(signal.SIGINT)
        assert signals.requested == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(os.name == "nt", reason="Windows delivers no SIGTERM")
def test_sigterm_asks_too():
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
    assert signals.requested == "SIGTERM"


def test_other_threads_leave_signals_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def use():
        with StopSignals() as signals:
            seen.append((signals.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [(None, before)]
