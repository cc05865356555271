"""Job `loss`: the output projection and its cross-entropy on a GPU, against PyTorch and liger-kernel.

`dualscan bench loss --save`. The floor is the products alone at the rate of a large one. liger-kernel is compared where
it is installed, with its usual sums in the weight's dtype and with sums in float32.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import block
from dualscan.ops.loss import linear_cross_entropy

# tokens, width, vocabulary
SHAPES = {"d2560 16384x50288": (16384, 2560, 50288), "d768 16384x50288": (16384, 768, 50288)}


def inputs(tokens: int, width: int, vocab: int) -> block.Inputs:
    """Normalised hidden states and an embedding, bfloat16; logits of standard deviation 2."""
    leaves = {
        "x": torch.randn(tokens, width, device="cuda").bfloat16(),
        "weight": (torch.randn(vocab, width, device="cuda") * 2 * width**-0.5).bfloat16(),
    }
    return {name: v.requires_grad_() for name, v in leaves.items()} | {"target": torch.randint(vocab, (tokens,)).cuda()}


def ours(t: block.Inputs, impl: Any = "auto") -> Tensor:
    """This library's."""
    return linear_cross_entropy(t["x"], t["weight"], t["target"], impl=impl)


def pytorch(t: block.Inputs) -> Tensor:
    """All logits at once, the loss in float32."""
    logits = t["x"] @ t["weight"].t()
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), t["target"])


def liger(sums: torch.dtype | None) -> Callable[[block.Inputs], Tensor]:
    """liger-kernel's, with the weight's gradient added up in a dtype."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

    def run(t: block.Inputs) -> Tensor:
        options = (None, None, -100, 0.0, 0.0, "mean", None, False, sums)
        out = Function.apply(t["x"], t["weight"], t["target"], *options)
        return out[0] if isinstance(out, tuple) else out

    return run


def measure(shape: str, repeats: int, ceiling: tuple[float, float]) -> list[dict[str, Any]]:
    """Every pass of one shape."""
    tokens, width, vocab = SHAPES[shape]
    runs: dict[str, block.Run] = {"dualscan": ours, "dualscan chunked": partial(ours, impl="chunked"), "torch": pytorch}
    if importlib.util.find_spec("liger_kernel") is not None:
        runs |= {"liger": liger(None), "liger fp32 sums": liger(torch.float32)}
    # As many slices as the whole has at d 2560, so that sums round as often: 16 of ours, and 16 of liger's.
    error = block.errors(runs, pytorch, inputs(tokens, 2048, 32768))
    torch.cuda.empty_cache()
    product = 1e3 * 2 * tokens * width * vocab / ceiling[1]
    floors = {"fwd": product, "fwdbwd": 3 * product}
    t = inputs(tokens, width, vocab)
    return block.passes("loss", shape, runs, t, floors, error=error, repeats=min(repeats, 7), graphs=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job."""
    return block.main("loss", measure, list(SHAPES), argv)
