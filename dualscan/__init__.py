"""State space models on PyTorch: structured state space duality (SSD), Mamba-2 and hybrids (arXiv 2405.21060)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it. Names load on first use, so that `import dualscan` stays light.
_PUBLIC = {
    "SSDOutput": "dualscan.ops.ssd",
    "ssd": "dualscan.ops.ssd",
    "ssd_step": "dualscan.ops.ssd",
    "linear_attention": "dualscan.ops.ssd",
    "sma": "dualscan.ops.sma",
    "SelectiveScanOutput": "dualscan.ops.selective_scan",
    "selective_scan": "dualscan.ops.selective_scan",
    "selective_scan_step": "dualscan.ops.selective_scan",
    "Conv1dOutput": "dualscan.ops.conv1d",
    "causal_conv1d": "dualscan.ops.conv1d",
    "rms_norm": "dualscan.ops.norm",
    "gated_rms_norm": "dualscan.ops.norm",
    "AddRMSNormOutput": "dualscan.ops.norm",
    "add_rms_norm": "dualscan.ops.norm",
    "linear_cross_entropy": "dualscan.ops.loss",
    "Mamba": "dualscan.nn.mamba",
    "Mamba2": "dualscan.nn.mamba2",
    "ModelConfig": "dualscan.models.config",
    "LMOutput": "dualscan.models.lm",
    "MambaLM": "dualscan.models.lm",
    "load": "dualscan.models.weights",
    "load_tokenizer": "dualscan.generate.text",
    "preset": "dualscan.models.presets",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from dualscan.generate.text import load_tokenizer
    from dualscan.models.config import ModelConfig
    from dualscan.models.lm import LMOutput, MambaLM
    from dualscan.models.presets import preset
    from dualscan.models.weights import load
    from dualscan.nn.mamba import Mamba
    from dualscan.nn.mamba2 import Mamba2
    from dualscan.ops.conv1d import Conv1dOutput, causal_conv1d
    from dualscan.ops.loss import linear_cross_entropy
    from dualscan.ops.norm import AddRMSNormOutput, add_rms_norm, gated_rms_norm, rms_norm
    from dualscan.ops.selective_scan import SelectiveScanOutput, selective_scan, selective_scan_step
    from dualscan.ops.sma import sma
    from dualscan.ops.ssd import SSDOutput, linear_attention, ssd, ssd_step


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dualscan' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
