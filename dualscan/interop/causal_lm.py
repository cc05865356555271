"""`MambaLM` as a model of transformers: configuration, `generate`, `save_pretrained`, the Trainer, adapters."""

import contextlib
import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep

from dualscan.interop.cache import read_state, write_state
from dualscan.models.config import ModelConfig
from dualscan.models.families.hf.dualscan import ALIASES, MODEL_TYPE, model_config
from dualscan.models.lm import MambaLM
from dualscan.nn.precision import Float32Parameters

# What peft adapts where nothing is asked for: the two matrices that every Mamba-2 layer has.
LORA_TARGETS = ("in_proj", "out_proj")


class DualscanConfig(PreTrainedConfig):
    """A `ModelConfig` as a configuration of transformers.

    Args:
        **values: the fields of `ModelConfig` by their names, and those that transformers has for every model
            (`eos_token_id`, `dtype`, ...). Fields that are not given are those of the preset mamba2_130m.

    Raises:
        ValueError: as `ModelConfig`.
        TypeError: as `ModelConfig`.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = ALIASES

    def __init__(self, **values: Any):
        for name, value in model_config(values).to_dict().items():
            setattr(self, name, value)
            values.pop(name, None)
        super().__init__(**values)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers does it, but not from the settings of another kind of model.

        Raises:
            ValueError: a configuration that `DualscanForCausalLM.save_pretrained` did not write.
        """
        kind = config_dict.get("model_type")
        if kind != MODEL_TYPE:
            what = f"is of the type {kind!r}" if kind else "has no model_type"
            raise ValueError(
                f"this config.json {what}, which DualscanForCausalLM did not write; use "
                "DualscanForCausalLM.from_model(dualscan.load(folder))."
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def model_config(self) -> ModelConfig:
        """The same as a `ModelConfig`, validated."""
        return model_config(vars(self))

    @property
    def num_hidden_layers(self) -> int:
        """Layers, counting every letter of the pattern."""
        return len(self.pattern)


class DualscanForCausalLM(PreTrainedModel, GenerationMixin):
    """A `MambaLM`, `self.model`, with the interface of transformers.

    `forward` and `generate` take batches with padding on either side, or anywhere: the real tokens are packed into one
    row with boundaries, so that a sequence gets what it would get alone. Caches are `DynamicCache`s.

    Args:
        config: sizes and layout.

    Example:
        >>> from dualscan.models.presets import preset
        >>> model = DualscanForCausalLM.from_model(MambaLM(preset("tiny")))
        >>> tokens = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
        >>> mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
        >>> alone = model(tokens[:1, 2:]).logits
        >>> torch.allclose(model(tokens, attention_mask=mask).logits[:1, 2:], alone, atol=1e-4)
        True
    """

    config_class = DualscanConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _is_stateful = True  # an earlier state cannot be had back, which speculative decoding would need

    def __init__(self, config: DualscanConfig):
        super().__init__(config)
        self.model = MambaLM(config.model_config)
        self._no_split_modules = {type(layer).__name__ for layer in self.model.layers}
        self._keep_in_fp32_modules_strict = {
            f"{module_name}.{name}"
            for module_name, module in self.named_modules()
            if isinstance(module, Float32Parameters)
            for name in module.float32_parameters
        }
        self.post_init()
        _tell_peft()

    @classmethod
    def from_model(cls, model: MambaLM, **values: Any) -> "DualscanForCausalLM":
        """Wraps a model without copying it; `.model` is the way back.

        Args:
            model: trained or loaded by this package.
            **values: further settings of `DualscanConfig`, such as `eos_token_id`; the ids of special tokens are by
                default those of the checkpoint that the model was loaded from.

        Raises:
            TypeError: something else than a `MambaLM`.
        """
        if not isinstance(model, MambaLM):
            raise TypeError(f"from_model takes a MambaLM, not a {type(model).__name__}; dualscan.load returns one.")
        known = {} if model.source is None else model.source.config
        special = {name: known[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in known}
        with torch.device("meta"):
            wrapped = cls(DualscanConfig(**model.config.to_dict(), **{**special, **values}))
        wrapped.model = model
        return wrapped.train(model.training)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers does it, but weights that are missing or left over are an error and not a warning.

        Raises:
            ValueError: the checkpoint and its configuration do not belong together.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        for what, names in (("misses", info["missing_keys"]), ("has the unknown", info["unexpected_keys"])):
            if names:
                first, others = min(names), len(names) - 1
                raise ValueError(
                    f"{model.name_or_path}: the checkpoint {what} {first!r}{f' and {others} more' if others else ''}; "
                    "its weights and its config.json belong to different models."
                )
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `MambaLM` initialises itself, and `from_pretrained` accepts no missing weight."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, the loss of `labels` where they are given, and the cache.

        Args:
            input_ids: `(batch, seqlen)` int64.
            attention_mask: `(batch, columns so far)`, 0 where a token is padding. Its last `seqlen` columns say which
                of `input_ids` are read; the cache remembers the others.
            position_ids: has no effect: positions follow from the mask.
            past_key_values: a `DynamicCache`, new or of an earlier call; it is written in place.
            labels: `(batch, seqlen)`, the inputs again; shifted here. -100 leaves a position out.
            use_cache: returns a cache; None is `config.use_cache` outside training.
            logits_to_keep: the last so many positions, or an index of positions; 0 is all.
            **others: `num_items_in_batch` and the like, for the loss.

        Returns:
            Logits `(batch, kept, vocab_size)`; those at padding mean nothing.

        Raises:
            ValueError: a mask that is not as described, a cache of another model, or an input that it does not take.
        """
        for name in ("inputs_embeds", "output_hidden_states", "output_attentions"):
            value = others.pop(name, None)
            if value is not None and value is not False:
                raise ValueError(f"{name} is not available from this model; pass input_ids, read logits and the cache.")
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", True) and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        state = None if past_key_values is None else read_state(past_key_values, len(self.model.layers))
        hidden, state = self._hidden_states(input_ids, attention_mask, state)
        if past_key_values is not None:
            write_state(past_key_values, state, input_ids.shape[1])
        logits = self._logits(slice_logits_to_keep(hidden, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **others)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None)

    def _hidden_states(self, tokens: Tensor, mask: Tensor | None, state: Any) -> tuple[Tensor, tuple[Any, ...]]:
        """Reads the real tokens of each row, packed if there is padding: `(batch, seqlen, d_model)` and the state."""
        if mask is not None:
            if mask.ndim != 2 or mask.shape[0] != tokens.shape[0] or mask.shape[1] < tokens.shape[1]:
                raise ValueError(
                    f"attention_mask has shape {tuple(mask.shape)} for input_ids {tuple(tokens.shape)}; expected "
                    "(batch, columns so far), 1 for tokens and 0 for padding."
                )
            mask = mask[:, mask.shape[1] - tokens.shape[1] :].bool()
        if mask is None or mask.all():
            # The cache is written over in any case, so that the state in it may be, too.
            return self.model.hidden_states(tokens, state=state, reuse_state=not torch.is_grad_enabled())
        ends = mask.sum(1).cumsum(0)
        cu_seqlens = torch.cat((ends.new_zeros(1), ends)).to(torch.int32)
        packed, state = self.model.hidden_states(tokens[mask][None], state=state, cu_seqlens=cu_seqlens)
        hidden = packed.new_zeros(*tokens.shape, packed.shape[-1])
        hidden[mask] = packed[0]
        return hidden, state

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.model.project_out(hidden)
        return logits[..., : self.config.vocab_size]  # the rest belongs to padding rows of the embedding

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Never; peft asks by this name, which is deprecated in the class above."""
        return False

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The output projection; None where it is the embedding."""
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the output projection."""
        self.model.lm_head = new_embeddings

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """Adds or removes tokens at the end of the vocabulary; rows are padded to a multiple, `vocab_multiple`."""
        tokens = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        multiple = pad_to_multiple_of or self.config.vocab_multiple
        super().resize_token_embeddings(tokens, multiple, mean_resizing)
        self.config.vocab_size, self.config.vocab_multiple = tokens, multiple
        self.model.config = self.config.model_config
        return self.model.embedding


def register_with_transformers() -> None:
    """Makes `AutoConfig` and `AutoModelForCausalLM` know folders that `DualscanForCausalLM.save_pretrained` wrote.

    Example:
        >>> register_with_transformers()
        >>> AutoConfig.for_model("dualscan", d_model=64, pattern="MM*", vocab_size=100).hidden_size
        64
    """
    AutoConfig.register(MODEL_TYPE, DualscanConfig, exist_ok=True)
    AutoModelForCausalLM.register(DualscanConfig, DualscanForCausalLM, exist_ok=True)
    _tell_peft()


@cache
def _tell_peft() -> None:
    """Gives peft, where it is installed, the default targets of its LoRA."""
    with contextlib.suppress(ImportError):
        constants = importlib.import_module("peft.utils.constants")
        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(MODEL_TYPE, list(LORA_TARGETS))
