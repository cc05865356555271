"""Forward and backward of a step as one CUDA graph: small models cost the program more time than the GPU.

A step of a 24-layer model is some thousand kernels, each of which costs the program as long as many of them run. A
graph is recorded once and replayed by one call.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dualscan.data.loader import Batch

# Kernels are compiled and libraries make their workspaces before the recording.
WARMUP_CALLS = 2


class GradientGraph:
    """A recorded computation of gradients. The parameters' gradients stay where they are; every replay overwrites them.

    Args:
        gradients: adds gradients to the parameters' and returns the summed loss, for batches.
        model: whose parameters get the gradients.
        batches: of the sizes that every replay has, on the device.

    Raises:
        ValueError: no CUDA device, packed batches, or a model that makes the program wait for the device.
    """

    def __init__(
        self, gradients: Callable[[Sequence[Batch]], Tensor], model: nn.Module, batches: Sequence[Batch]
    ) -> None:
        if not batches[0].tokens.is_cuda:
            raise ValueError(f"a CUDA graph needs a CUDA device, not {batches[0].tokens.device}; leave it out.")
        if any(batch.cu_seqlens is not None for batch in batches):
            raise ValueError("a CUDA graph has fixed sizes, and packed batches have not; use one of the two.")
        self._batches = [Batch(batch.tokens.clone(), batch.targets.clone(), None) for batch in batches]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_CALLS):
                model.zero_grad()
                gradients(self._batches)
        torch.cuda.current_stream().wait_stream(stream)
        # Without gradients, the recorded backward makes them in the graph's own memory, and does not add to them.
        model.zero_grad()
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph, stream=stream):
                self._nll = gradients(self._batches)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"the model cannot be recorded as a CUDA graph ({reason}); train it without.") from error

    def __call__(self, batches: Sequence[Batch]) -> Tensor:
        """Replays the graph on batches from the CPU; the summed loss, which the next call overwrites."""
        for mine, batch in zip(self._batches, batches, strict=True):
            mine.tokens.copy_(batch.tokens.pin_memory(), non_blocking=True)
            mine.targets.copy_(batch.targets.pin_memory(), non_blocking=True)
        self._graph.replay()
        return self._nll
