"""`dualscan env`: versions, devices, and which implementation each operator takes and why."""

import json
import os
import pkgutil
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

import torch

import dualscan
import dualscan.ops
from dualscan.cli._support.arguments import parse
from dualscan.ops._dispatch import OPERATORS, explain
from dualscan.train.runtime import pick_precision

PACKAGES = (
    "numpy",
    "safetensors",
    "tqdm",
    "tyro",
    "tokenizers",
    "zstandard",
    "matplotlib",
    "numba",
    "triton",
    "transformers",
)
# What decides the speed of matrix products and of elementwise work on a CPU.
CPU_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "amx_fp16", "neon", "sve", "bf16")


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvArguments:
    """Versions, devices, and which implementation each operator takes.

    Attributes:
        json: print one JSON object instead of tables.
    """

    json: bool = False


def main(argv: Sequence[str]) -> int:
    """Prints the environment to stdout; returns the exit code."""
    arguments = parse(EnvArguments, argv, prog="dualscan env")
    report = environment()
    print(json.dumps(report, indent=1) if arguments.json else as_text(report))
    return 0


def environment() -> dict[str, Any]:
    """Everything that a report of a problem should say about the machine, as JSON values."""
    for module in pkgutil.iter_modules(dualscan.ops.__path__, "dualscan.ops."):
        if module.ispkg:
            import_module(module.name)  # registers the operator
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    elif torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    return {
        "versions": {
            "dualscan": dualscan.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in PACKAGES},
        },
        "system": {"platform": platform.platform(), "threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "devices": [_describe(device) for device in devices],
        "operators": [
            {
                "operator": operator.name,
                "device": device.type,
                "takes": takes,
                "why": why,
                "impl": ["auto", *operator.impls] if operator.selectable else [],
            }
            for device in {device.type: device for device in devices}.values()
            for operator in OPERATORS.values()
            for takes, why in (explain(operator, device),)
        ],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _describe(device: torch.device) -> dict[str, Any]:
    precision = pick_precision("auto", device)
    described: dict[str, Any] = {
        "device": str(device),
        "training_dtype": str(precision.dtype).removeprefix("torch."),
        "why": precision.why,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["name"] = properties.name
        described["memory_gib"] = round(properties.total_memory / 2**30, 1)
        described["capability"] = f"{properties.major}.{properties.minor}"
        described["cuda"] = torch.version.cuda
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        described["name"] = capabilities.get("cpu_name") or platform.processor() or platform.machine()
        described["features"] = [name for name in CPU_FEATURES if capabilities.get(name)]
        described["torch_uses"] = torch.backends.cpu.get_cpu_capability()
    return described


def as_text(report: dict[str, Any]) -> str:
    """The report as aligned tables for people."""
    versions = {name: version or "not installed" for name, version in report["versions"].items()}
    devices = {}
    for device in report["devices"]:
        extras = [device[key] for key in ("capability", "torch_uses") if key in device]
        extras += [f"{device['memory_gib']} GiB"] if "memory_gib" in device else []
        extras += [" ".join(device["features"])] if device.get("features") else []
        name = ", ".join([str(device.get("name", "")), *extras]).strip(", ")
        devices[device["device"]] = f"{name}; trains in {device['training_dtype']}: {device['why']}"
    system = report["system"]
    return "\n\n".join(
        [
            _table("versions", versions),
            _table(
                "system",
                {"platform": system["platform"], "CPU threads": f"{system['threads']} of {system['cores']} cores"},
            ),
            _table("devices", devices),
            _grid(
                ("operator", "device", "takes", "why", "impl= accepts"),
                [
                    (row["operator"], row["device"], row["takes"], row["why"], ", ".join(row["impl"]) or "(no impl=)")
                    for row in report["operators"]
                ],
            ),
        ]
    )


def _table(title: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())])


def _grid(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows])
    return "\n".join(line.rstrip() for line in lines)
