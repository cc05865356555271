"""A layer's state as a layer of transformers' caches."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache


class StateLayer(CacheLayerMixin):
    """What one layer of a `MambaLM` remembers, whatever its kind, with the cache operations of `generate`.

    The state is a tuple of tensors, one row a sequence, so that beam search and the like work on all kinds of layers
    alike. A state space model keeps no earlier states: a cache cannot be cropped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a state is made by the first forward pass, not from keys and values.")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a state is replaced by the forward pass; it takes no keys and values.")

    def get_seq_length(self) -> int:
        """Columns of the batch that were read, padding included, as attention masks count them."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: without a limit."""
        return -1

    def reset(self) -> None:
        self.state, self.seen = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        raise RuntimeError("a state space model cannot go back to an earlier state; generate again from the prompt.")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.state = tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, self.state)


def read_state(cache: Cache, n_layers: int) -> tuple[Any, ...] | None:
    """The model's state, or None if the cache is fresh; a fresh `DynamicCache` is given layers that can hold one.

    Raises:
        ValueError: a cache of another kind or of another model.
    """
    if isinstance(cache, DynamicCache) and not any(_is_filled(layer) for layer in cache.layers):
        cache.layers = [StateLayer() for _ in range(n_layers)]
    layers = _state_layers(cache, n_layers)
    return tuple(layer.state for layer in layers) if layers[0].seen else None


def write_state(cache: Cache, state: tuple[Any, ...], tokens: int) -> None:
    """Puts the state after `tokens` more columns into a cache that `read_state` accepted."""
    for layer, after in zip(_state_layers(cache, len(state)), state, strict=True):
        layer.state, layer.seen = after, layer.seen + tokens


def _is_filled(layer: Any) -> bool:
    return layer.seen > 0 if isinstance(layer, StateLayer) else layer.is_initialized


def _state_layers(cache: Cache, n_layers: int) -> list[StateLayer]:
    layers = [layer for layer in cache.layers if isinstance(layer, StateLayer)]
    if len(layers) != len(cache.layers) or len(layers) != n_layers:
        kinds = " and ".join(sorted({type(layer).__name__ for layer in cache.layers}))
        raise ValueError(
            f"past_key_values is a {type(cache).__name__} of {len(cache.layers)} layers ({kinds}), which does not hold "
            f"the {n_layers} states of this model; pass DynamicCache(), or nothing."
        )
    return layers
