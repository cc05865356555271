"""A decoding step as a CUDA graph: on a GPU a step of a whole model is hundreds of short kernels, and what takes the
time is starting them one by one.

A graph is recorded once a generation, when the first step has been started, and replayed for every other step. Tokens,
logits and state keep their addresses: what a step returns elsewhere in memory is copied to where it came from. A model
whose state grows with the text (attention) or that looks at values on the host on the way (experts) goes on step by
step. Nothing here waits for the device, which may still be reading the prompts meanwhile.
"""

import logging
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from dualscan.models.lm import MambaLM

logger = logging.getLogger("dualscan.generate")

# Recording costs about as much as a few steps.
LEAST_STEPS = 8


class Stepper:
    """Decoding steps of a model, replayed from a graph where that is possible.

    Args:
        model: in inference mode, as whatever calls this.
        state: after the prompts; taken over.
        steps: how many there will be at most.
    """

    def __init__(self, model: "MambaLM", state: Any, steps: int):
        self._model, self._state = model, state
        self._recording: tuple[torch.cuda.CUDAGraph, Tensor, Tensor] | None = None
        self._record = steps >= LEAST_STEPS and next(model.parameters()).is_cuda

    @property
    def recorded(self) -> bool:
        """Whether steps are replayed."""
        return self._recording is not None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Takes `(batch,)` tokens in and returns the logits `(batch, vocab)`, good until the next call."""
        if self._recording is not None:
            graph, place, logits = self._recording
            place.copy_(tokens[:, None])
            graph.replay()
            return logits
        shapes = [t.shape for t in _tensors(self._state)] if self._record else None
        logits, self._state = self._model(tokens[:, None], state=self._state, reuse_state=True)
        if self._record:
            self._record = False
            if shapes == [t.shape for t in _tensors(self._state)]:
                self._capture(tokens)
        return logits[:, -1]

    def _capture(self, tokens: Tensor) -> None:
        """Records the next step. Nothing runs: the state stays as it is, also where recording fails."""
        graph, place = torch.cuda.CUDAGraph(), tokens[:, None].clone()
        try:
            # Not `torch.cuda.graph`: that waits for the device and gives the allocator's memory back first.
            with torch.cuda.device(tokens.device), torch.cuda.stream(_recording_stream(tokens.device)):
                graph.capture_begin()
                try:
                    logits, after = self._model(place, state=self._state, reuse_state=True)
                    for old, new in zip(_tensors(self._state), _tensors(after), strict=True):
                        if new.data_ptr() != old.data_ptr():
                            old.copy_(new)
                finally:
                    graph.capture_end()
        except RuntimeError as problem:
            logger.info("steps are not replayed from a CUDA graph: %s", str(problem).strip().splitlines()[0])
            return
        self._recording = graph, place, logits[:, -1]


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: the libraries keep memory for every stream that they have seen."""
    return torch.cuda.Stream(device)


def _tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
