"""Compiles Gluon kernels for a Hopper GPU where there is none: what the emulator cannot know about them.

`signature` describes a launch by plain data, and `python -m tests.gluon.compiled` compiles launches that it reads as
JSON: in a process of its own, since no kernel is compiled under TRITON_INTERPRET.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def signature(kernel: Any, arguments: tuple[Any, ...], **constants: Any) -> dict[str, Any]:
    """A launch as Triton specialises it: types, alignment to 16, and what is absent, one or a constant."""
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    free = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    special = {name for name, x in given.items() if x is None or (isinstance(x, int) and x == 1 and name not in free)}
    constants |= {name: given.pop(name) for name in special}
    types = {name: _type(given[name]) if name in given else "constexpr" for name in kernel.arg_names}
    return {
        "kernel": [kernel.fn.__module__, kernel.fn.__name__],
        "types": types,
        "constants": {name: x for name, x in constants.items() if name in types},
        "aligned": [name for name, x in given.items() if name not in free and _aligned(x)],
        "options": {"num_warps": constants.get("num_warps", 4), "maxnreg": constants.get("maxnreg")},
    }


def _type(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"*{TYPES[x.dtype]}"
    if isinstance(x, int):
        return "i32" if -(2**31) <= x < 2**31 else "i64"
    if isinstance(x, float):
        return "fp32"
    return f"tensordesc<{TYPES[x.base.dtype]}[{','.join(map(str, x.block_shape))}],{x.layout!r}>"


def _aligned(x: Any) -> bool:
    return (x.data_ptr() if isinstance(x, Tensor) else x if isinstance(x, int) else 1) % 16 == 0


def compiled(launches: list[dict[str, Any]]) -> list[dict[str, int]]:
    """What each takes: registers a thread, stack a thread (bytes that registers do not hold), shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": folder}
        done = subprocess.run(
            [sys.executable, "-m", __name__], input=json.dumps(launches), env=environment, capture_output=True,
            text=True, check=False, cwd=Path(__file__).parents[2],
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _compile(launch: dict[str, Any]) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    module, name = launch["kernel"]
    place = {name: (i,) for i, name in enumerate(launch["types"])}
    constants = {place[name]: x for name, x in launch["constants"].items()}
    attributes = {place[name]: [["tt.divisibility", 16]] for name in launch["aligned"]}
    source = GluonASTSource(getattr(import_module(module), name), launch["types"], constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch["options"])
    usage = _usage(Path(triton.__file__).parent, binary.asm["cubin"])
    return {"registers": usage["REG"], "stack": usage["STACK"], "shared": binary.metadata.shared}


def _usage(triton: Path, cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [triton / "backends/nvidia/bin/cuobjdump", "-res-usage", file]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = [field.split(":") for field in out.split() if field.count(":") == 1]
    return {name: int(x) for name, x in fields if x.isdigit()}


if __name__ == "__main__":
    print(json.dumps([_compile(launch) for launch in json.load(sys.stdin)]))
