"""Job `norm`: RMSNorm of the float32 residual stream, alone and with the sum before it, and the gated RMSNorm on a GPU.

Against PyTorch and mamba_ssm.

`dualscan bench norm --save`. The floor is every input read and the results written at copy bandwidth; with gradients,
also what is normalised and the cotangents read and the gradients written. mamba_ssm is compared where it is installed.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import block
from benchmarks.ops.ssd import rival_package
from dualscan.ops.norm import add_rms_norm, gated_rms_norm, rms_norm

# rows, channels, columns of the projection that the gate is the first of (0: no gate)
SHAPES = {
    "gated d2560 8x2048": (8 * 2048, 5120, 10576),
    "plain d2560 8x2048": (8 * 2048, 2560, 0),
    "gated d768 16x1024": (16 * 1024, 1536, 3352),
    "plain d768 16x1024": (16 * 1024, 768, 0),
}
# rows, channels: a bfloat16 output added to a float32 stream, of which the norm is bfloat16
SUMS = {"sum and norm d2560 8x2048": (8 * 2048, 2560), "sum and norm d768 16x1024": (16 * 1024, 768)}


def inputs(rows: int, channels: int, columns: int) -> block.Inputs:
    """bfloat16 with a gate, float32 without, and a float32 weight."""
    dtype = torch.bfloat16 if columns else torch.float32
    leaves = {"x": torch.randn(rows, channels, device="cuda").to(dtype), "weight": torch.randn(channels, device="cuda")}
    if columns:
        leaves["z"] = torch.randn(rows, columns, device="cuda").to(dtype)[:, :channels]
    dy = torch.randn(rows, channels, device="cuda").to(dtype)
    return {name: v.requires_grad_() for name, v in leaves.items()} | {"dy": dy}


def sum_inputs(rows: int, channels: int) -> block.Inputs:
    """A float32 stream and weight, and what a layer made of it in bfloat16."""
    h, d_h, y, d_normed = (torch.randn(rows, channels, device="cuda") for _ in range(4))
    leaves = {"h": h, "x": y.bfloat16(), "weight": torch.randn(channels, device="cuda")}
    return {name: v.requires_grad_() for name, v in leaves.items()} | {"dy": d_h, "dy1": d_normed.bfloat16()}


def our_sum(t: block.Inputs) -> tuple[Tensor, Tensor]:
    """This library's, in one pass."""
    return add_rms_norm(t["h"], t["x"], t["weight"], dtype=t["dy1"].dtype)


def our_steps(t: block.Inputs) -> tuple[Tensor, Tensor]:
    """This library's norm, after PyTorch's sum and before its cast."""
    h = t["h"] + t["x"]
    return h, rms_norm(h, t["weight"]).to(t["dy1"].dtype)


def pytorch_sum(t: block.Inputs) -> tuple[Tensor, Tensor]:
    """PyTorch's operators."""
    h = t["h"] + t["x"]
    return h, F.rms_norm(h, t["weight"].shape, t["weight"], 1e-5).to(t["dy1"].dtype)


def ours(t: block.Inputs) -> Tensor:
    """This library's."""
    return gated_rms_norm(t["x"], t["z"], t["weight"]) if "z" in t else rms_norm(t["x"], t["weight"])


def pytorch(t: block.Inputs) -> Tensor:
    """PyTorch's operators."""
    x = t["x"] * F.silu(t["z"]) if "z" in t else t["x"]
    return F.rms_norm(x, t["weight"].shape, t["weight"].to(x.dtype), 1e-5)


@cache
def mamba_ssm_norm(module: str = "layernorm_gated", function: str = "rmsnorm_fn") -> Callable[..., Any] | None:
    """mamba_ssm's Triton kernel, or None."""
    if not rival_package():
        return None
    return getattr(importlib.import_module(f"mamba_ssm.ops.triton.{module}"), function)


def mamba_ssm(t: block.Inputs) -> Tensor:
    """mamba_ssm's."""
    rmsnorm_fn = mamba_ssm_norm()
    assert rmsnorm_fn is not None
    return rmsnorm_fn(t["x"], t["weight"], None, z=t.get("z"), eps=1e-5, norm_before_gate=False)


def mamba_ssm_sum(t: block.Inputs) -> tuple[Tensor, Tensor]:
    """mamba_ssm's, in one pass."""
    layer_norm_fn = mamba_ssm_norm("layer_norm", "layer_norm_fn")
    assert layer_norm_fn is not None
    stream = {"residual": t["h"], "prenorm": True, "residual_in_fp32": True}
    normed, h = layer_norm_fn(t["x"], t["weight"], None, eps=1e-5, is_rms_norm=True, **stream)
    return h, normed


def measure_sum(shape: str, repeats: int, ceiling: tuple[float, float]) -> list[dict[str, Any]]:
    """Every pass of a sum and its norm."""
    rows, channels = SUMS[shape]
    runs: dict[str, block.Run] = {"dualscan": our_sum, "dualscan in steps": our_steps, "torch": pytorch_sum}
    if mamba_ssm_norm() is not None:
        runs["mamba_ssm"] = mamba_ssm_sum
    error = block.errors(runs, pytorch_sum, sum_inputs(512, channels))
    once = 1e3 * rows * channels / ceiling[0]
    floors = {"fwd": (4 + 2 + 4 + 2) * once, "fwdbwd": (12 + 4 + 4 + 2 + 4 + 2) * once}
    return block.passes("norm", shape, runs, sum_inputs(rows, channels), floors, error=error, repeats=repeats)


def measure(shape: str, repeats: int, ceiling: tuple[float, float]) -> list[dict[str, Any]]:
    """Every pass of one shape."""
    if shape in SUMS:
        return measure_sum(shape, repeats, ceiling)
    rows, channels, columns = SHAPES[shape]
    runs = {"dualscan": ours, "torch": pytorch} | ({} if mamba_ssm_norm() is None else {"mamba_ssm": mamba_ssm})
    error = block.errors(runs, pytorch, inputs(512, channels, columns))
    once = 1e3 * rows * channels * (2 if columns else 4) / ceiling[0]
    floors = {"fwd": 3 * once, "fwdbwd": 8 * once} if columns else {"fwd": 2 * once, "fwdbwd": 5 * once}
    t = inputs(rows, channels, columns)
    return block.passes("norm", shape, runs, t, floors, error=error, repeats=repeats)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job."""
    return block.main("norm", measure, [*SHAPES, *SUMS], argv)
