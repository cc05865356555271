"""One optimizer step: gradients of its micro-batches, clipping, update. Nothing in it waits for a GPU.

A GPU works behind the program that feeds it. Whatever asks it for a number (`.item()`, `.cpu()`) stops the program
until the GPU has nothing left to do, and the GPU stands still until the program has fed it again. So the decision
whether a step may change the model is taken on the device, and its loss is read while the next step runs.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dualscan.data.loader import Batch
from dualscan.data.packing import IGNORE_INDEX
from dualscan.train.evaluate import total_nll
from dualscan.train.runtime import ComputePrecision, sent
from dualscan.train.step.graph import GradientGraph
from dualscan.train.step.update import Update

if TYPE_CHECKING:
    from dualscan.models.lm import MambaLM


class Reading:
    """The loss and the norm of the gradient of a step, on their way from the device."""

    def __init__(self, loss: Tensor, grad_norm: Tensor) -> None:
        self._values, self._arrived = torch.stack([loss, grad_norm.to(loss.dtype)]), None
        if self._values.is_cuda:
            on_device = self._values
            self._values = torch.empty_like(on_device, device="cpu", pin_memory=True)
            self._values.copy_(on_device, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def values(self) -> tuple[float, float]:
        """Loss in nats per token, and gradient norm before clipping; waits until the step is done."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, grad_norm = self._values.tolist()
        return loss, grad_norm


class TrainStep:
    """Gradients and update of a model, a call a step.

    The update does not happen where the loss or the gradient is not finite: the model stays as it was, and `Reading`
    tells. With the fused AdamW clipping and that decision are part of the update itself.

    Args:
        model: on one device.
        optimizer: of the model's parameters.
        precision: of the matrix products.
        grad_clip: largest norm of the whole gradient; 0 switches clipping off.
    """

    def __init__(
        self,
        model: "MambaLM",
        optimizer: torch.optim.Optimizer,
        *,
        precision: ComputePrecision,
        grad_clip: float = 0.0,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._precision, self._grad_clip = precision, grad_clip
        self._device = next(model.parameters()).device
        self._fused = all(group.get("fused") for group in optimizer.param_groups)
        self._graph: GradientGraph | None = None
        self._kernel = Update(optimizer)

    def record(self, batches: Sequence[Batch]) -> None:
        """Records the gradients of batches like these as a CUDA graph, which all later calls replay.

        Args:
            batches: as many, of such sizes, as every later step has; what they hold does not matter.

        Raises:
            ValueError: there is no CUDA device, or the model does what a graph cannot hold.
        """
        self._graph = GradientGraph(self._gradients, self.model, [_move(batch, self._device) for batch in batches])

    def forget(self) -> None:
        """Drops the graph and its memory; later calls compute their gradients as before."""
        self._graph = None
        self.optimizer.zero_grad()

    def __call__(self, batches: Sequence[Batch]) -> Reading:
        """One step over micro-batches, which count by their number of targets.

        Args:
            batches: on the CPU.

        Returns:
            `Reading`.
        """
        count = torch.tensor(float(sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in batches)))
        if self._graph is None:
            nll = self._gradients([_move(batch, self._device) for batch in batches])
        else:
            nll = self._graph(batches)
        count = sent(count, self._device)
        loss = nll / count
        grad_norm = get_total_norm(p.grad for p in self.model.parameters() if p.grad is not None) / count
        self._update(loss, grad_norm, count)
        if self._graph is None:
            self.optimizer.zero_grad()
        return Reading(loss, grad_norm)

    def _gradients(self, batches: Sequence[Batch]) -> Tensor:
        """Adds the gradients of the summed loss to the parameters'; returns that sum.

        Of the sum, because a loss that has computed its gradients already would have to go over them again, and over
        that of the vocabulary's matrix above all: the update divides by the number of targets on its way.
        """
        # Apple's GPUs have no float64.
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        summed = torch.zeros((), dtype=dtype, device=self._device)
        for batch in batches:
            nll = total_nll(self.model, batch, self._precision)
            nll.backward()
            summed += nll.detach()
        return summed

    def _update(self, loss: Tensor, grad_norm: Tensor, count: Tensor) -> None:
        """Clips and updates, unless the loss or the gradient is not finite.

        Args:
            loss: of the step, a mean.
            grad_norm: of its gradient.
            count: the parameters' gradients are `count` times as large.
        """
        finite = loss.isfinite() & grad_norm.isfinite()
        if self._fused:
            divisor = (grad_norm / (self._grad_clip or math.inf)).clamp(min=1.0).mul(count).float()
            skip = (~finite).float()
            if Update.runs(self.optimizer, self._device) and self._kernel(divisor, skip):
                return
            # The fused update divides gradients by `grad_scale` and leaves everything alone where `found_inf` is 1. It
            # is what torch.amp.GradScaler uses.
            self.optimizer.grad_scale = divisor  # pyrefly: ignore[missing-attribute]
            self.optimizer.found_inf = skip  # pyrefly: ignore[missing-attribute]
            self.optimizer.step()
        elif finite:
            torch._foreach_div_([p.grad for p in self.model.parameters() if p.grad is not None], count)
            clip_grads_with_norm_(self.model.parameters(), self._grad_clip or math.inf, grad_norm)
            self.optimizer.step()


def _move(batch: Batch, device: torch.device) -> Batch:
    cu_seqlens = None if batch.cu_seqlens is None else sent(batch.cu_seqlens, device)
    return Batch(sent(batch.tokens, device), sent(batch.targets, device), cu_seqlens)
