"""A decoding step as a CUDA graph: on a GPU a step of a whole model is hundreds of short kernels, and what takes the
time is starting them one by one.

A graph is recorded once a generation, when the first step has been started, and replayed for every other step. Tokens,
logits and state keep their addresses: what a step returns elsewhere in memory is copied to where it came from. A model
whose state grows with the text (attention) or that looks at values on the host on the way (experts) goes on step by
step. Nothing here waits for the device, which may still be reading the prompts meanwhile.

Since nobody else sees the state any more, that of layers whose kernels can do so is written once every few tokens.
"""

import logging
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dualscan.nn.mamba2 import Mamba2State
from dualscan.nn.step import describe

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
        before = self._state
        shapes = [t.shape for t in _tensors(before)] if self._record else None
        logits, self._state = self._model(tokens[:, None], state=before, reuse_state=True)
        if self._record:
            self._record = False
            if shapes == [t.shape for t in _tensors(self._state)]:
                self._capture(tokens, deferred(self._model.layers, before, self._state))
        return logits[:, -1]

    def _capture(self, tokens: Tensor, state: tuple[Any, ...]) -> None:
        """Records the next step, from `state` on. Nothing runs: where recording fails, the state is still `_state`."""
        graph, place = torch.cuda.CUDAGraph(), tokens[:, None].clone()
        try:
            # Not `torch.cuda.graph`: that waits for the device and gives the allocator's memory back first.
            with torch.cuda.device(tokens.device), torch.cuda.stream(_recording_stream(tokens.device)):
                graph.capture_begin()
                try:
                    logits, after = self._model(place, state=state, reuse_state=True)
                    for old, new in zip(_tensors(state), _tensors(after), strict=True):
                        if new.data_ptr() != old.data_ptr():
                            old.copy_(new)
                finally:
                    graph.capture_end()
        except RuntimeError as problem:
            logger.info("steps are not replayed from a CUDA graph: %s", str(problem).strip().splitlines()[0])
            return
        self._state, self._recording = state, (graph, place, logits[:, -1])


def deferred(layers: Iterable[Any], before: Sequence[Any], after: Sequence[Any]) -> tuple[Any, ...]:
    """The states `after` a step, those of SSD to be written once every few tokens from now on where kernels can do so.

    That asks for layers whose state the step changed where it was `before`: they go through a GPU's kernels.
    """
    states, count = list(after), None
    for i, (layer, old, new) in enumerate(zip(layers, before, after, strict=True)):
        if not isinstance(new, Mamba2State) or new.ssm is not old.ssm:
            continue
        from dualscan.ops.decode import triton_fused

        described = describe(layer.mixer, layer.norm)
        if len(new.ssm) >= triton_fused.DEFERRED_ROWS and triton_fused.takes(*described, *new):
            count = torch.zeros(1, dtype=torch.int32, device=new.ssm.device) if count is None else count
            states[i] = triton_fused.defer(*described, *new, count)
    return tuple(states)


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: the libraries keep memory for every stream that they have seen."""
    return torch.cuda.Stream(device)


def _tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
