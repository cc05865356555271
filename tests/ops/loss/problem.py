"""Random losses, PyTorch's own cross-entropy as the oracle, and the comparison of both."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualscan.ops.loss import linear_cross_entropy
from tests.oracle import assert_close

Tensors = dict[str, Tensor]
CORNERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "bias": {"bias": True},
    "z-loss": {"z_loss": 0.1},
    "smoothed": {"label_smoothing": 0.3},
    "smoothed to the end": {"label_smoothing": 1.0},
    "everything": {"bias": True, "z_loss": 0.1, "label_smoothing": 0.3},
    "everything, none": {"bias": True, "z_loss": 0.1, "label_smoothing": 0.3, "reduction": "none"},
    "nothing ignored": {"ignored": False},
    "another index": {"ignore_index": 3},
    "one token": {"shape": (1,), "ignored": False},
    "one dimension": {"shape": ()},
    "no tokens": {"shape": (2, 0), "ignored": False, "reduction": "sum"},
    "a vocabulary of one": {"vocab": 1},
    "an even vocabulary": {"vocab": 64, "bias": True},
}


def problem(
    *,
    shape: tuple[int, ...] = (3, 7),
    d: int = 12,
    vocab: int = 37,
    bias: bool = False,
    ignored: bool = True,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Tensors, Tensor, dict[str, Any]]:
    """Inputs by argument name, targets, and the options."""
    tensors = {"x": torch.randn(*shape, d), "weight": torch.randn(vocab, d)}
    if bias:
        tensors["bias"] = torch.randn(vocab)
    target = torch.randint(vocab, shape)
    if ignored and target.ndim > 1:
        target[0, 1::3] = options.get("ignore_index", -100)
    return {name: t.to(dtype) for name, t in tensors.items()}, target, options


def by_pytorch(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """All logits at once, through `F.cross_entropy`."""
    logits, flat = F.linear(x, weight, bias).reshape(-1, len(weight)), target.flatten()
    losses = F.cross_entropy(logits, flat, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    losses = losses + torch.where(flat == ignore_index, 0, z_loss * torch.logsumexp(logits, -1) ** 2)
    if reduction == "none":
        return losses.view(target.shape)
    return losses.sum() / (flat != ignore_index).sum() if reduction == "mean" else losses.sum()


def evaluate(run: Callable[..., Tensor], tensors: Tensors, target: Tensor, options: dict[str, Any]) -> Tensors:
    """The loss and its gradients, for a cotangent that is not one."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    loss = run(**leaves, target=target, **options)
    cotangent = torch.linspace(0.5, 2, max(loss.numel(), 1), dtype=loss.dtype, device=loss.device)[: loss.numel()]
    grads = torch.autograd.grad(loss, list(leaves.values()), cotangent.view(loss.shape))
    return {"loss": loss.detach(), **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)}}


def compare(tensors: Tensors, target: Tensor, options: dict[str, Any], device: str = "cpu", **ours: Any) -> None:
    """Loss and gradients against PyTorch in float64, in the dtypes of their tensors."""
    dtype = tensors["x"].dtype
    expected = evaluate(by_pytorch, {name: t.double() for name, t in tensors.items()}, target, options)
    there = {name: t.to(device) for name, t in tensors.items()}
    for name, value in evaluate(linear_cross_entropy, there, target.to(device), {**options, **ours}).items():
        if name == "loss":
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        else:
            assert value.dtype == tensors[name[1:]].dtype, name
        assert_close(name, value.cpu(), expected[name], dtype=dtype, gradient=name != "loss")
