"""The language model: embedding, a pattern of residual blocks, final norm, output projection."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualscan.models.config import ModelConfig
from dualscan.models.layers import blocks
from dualscan.nn import init
from dualscan.nn.block import keep_in, read_blocks, step_blocks
from dualscan.nn.hybrid.shared import SharedBlock
from dualscan.nn.norm import RMSNorm, add_and_norm, project_normed
from dualscan.nn.precision import apply_linear, is_plain_linear, project
from dualscan.ops._autograd import unwatched
from dualscan.ops.loss import linear_cross_entropy
from dualscan.ops.loss.tied import tied_embedding

if TYPE_CHECKING:
    from dualscan.generate.engine import GenerateOutput
    from dualscan.models.weights import Source

# A loss over more logits than this goes over them in blocks of tokens: slower by a fifth on a CPU, without the memory.
MOST_LOGITS = 2**27


class LMOutput(NamedTuple):
    """What a `MambaLM` returns.

    Attributes:
        logits: `(batch, seqlen, padded_vocab_size)`; columns from `vocab_size` on are padding.
        state: one entry a layer; goes into the next call to continue the sequence.
    """

    logits: Tensor
    state: tuple[Any, ...]


class MambaLM(nn.Module):
    """A causal language model with the layers that `config.pattern` names.

    Args:
        config: sizes and layout.

    Example:
        >>> from dualscan.models.presets import preset
        >>> model = MambaLM(preset("tiny"))
        >>> tokens = torch.randint(256, (1, 12))
        >>> logits, state = model(tokens)
        >>> first, state = model(tokens[:, :8])
        >>> torch.allclose(model(tokens[:, 8:], state=state).logits, logits[:, 8:], atol=1e-4)
        True
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.source: Source | None = None  # set where another program's checkpoint was loaded
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(blocks(config))
        self.norm_f = RMSNorm(config.d_model, eps=config.norm_eps)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """The paper's recipe: embeddings N(0, 0.02), zero biases, last maps of the branches scaled by 1/√n_layers."""
        nn.init.normal_(self.embedding.weight, std=self.config.embedding_std)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.layers.named_parameters():
            if name.endswith("out_proj.weight"):
                init.scale_residual_projection(parameter, self.config.n_layers)

    def forward(
        self,
        tokens: Tensor,
        *,
        state: tuple[Any, ...] | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int = 0,
        reuse_state: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> LMOutput:
        """Logits of the next token, and the state after the last one.

        Args:
            tokens: `(batch, seqlen)` int64.
            state: of a previous call, or None at the start; not modified, unless `reuse_state`.
            cu_seqlens: `(nseq + 1,)` int32 boundaries of sequences packed along time; batch must be 1.
            logits_to_keep: computes only the last so many positions' logits; 0 computes all.
            reuse_state: the next state may take the place of `state` in memory, which must not be used any more;
                saves a decoding step a third of the state's traffic.
            state_dtype: of the SSM states of Mamba-2 layers that are returned, float32 or bfloat16; None leaves each
                as it is: float32 at the start, later like the given one. Layers compute with float32 all the same.

        Returns:
            `LMOutput(logits, state)`.

        Raises:
            ValueError: tokens of a wrong rank or, on a CPU, out of range; a state of another model, or another
                `state_dtype`.
            TypeError: tokens that are not integers.
        """
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep={logits_to_keep} must not be negative; 0 keeps all.")
        h, waiting, state = self._read(tokens, state, cu_seqlens, reuse_state, state_dtype)
        if logits_to_keep:
            h, waiting = h[:, -logits_to_keep:], waiting if waiting is None else waiting[:, -logits_to_keep:]
        logits = None
        if self.config.logits_scale == 1.0 and self._head_is_plain and waiting is None:
            logits = project_normed(h, self.norm_f, self.output_weight)
        return LMOutput(self.project_out(self._finish(h, waiting)) if logits is None else logits, state)

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        state: tuple[Any, ...] | None = None,
        cu_seqlens: Tensor | None = None,
        reuse_state: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """The hidden states `(batch, seqlen, d_model)` that the output projection takes, and the state."""
        h, waiting, state = self._read(tokens, state, cu_seqlens, reuse_state, state_dtype)
        return self._finish(h, waiting), state

    def _read(
        self,
        tokens: Tensor,
        state: tuple[Any, ...] | None,
        cu_seqlens: Tensor | None,
        reuse_state: bool,
        state_dtype: torch.dtype | None,
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, tuple[Any, ...]]:
        """The residual stream after the last layer, what is still to be added to it (None: nothing), and the state.

        `embed` may take the embedding's place."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; expected (batch, seqlen).")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens have dtype {tokens.dtype}; use torch.int64.")
        if state is not None and len(state) != len(self.layers):
            raise ValueError(f"the state has {len(state)} layers, the model {len(self.layers)}; use its own state.")
        h = self._embed(tokens, self.embedding if embed is None else embed)
        if h.dtype in (torch.bfloat16, torch.float16):
            h = h.float()
        if self.config.embedding_scale != 1.0:
            h = h * self.config.embedding_scale
        layers = self.layers
        if "S" in self.config.pattern:
            layers = [partial(b, embedding=h) if isinstance(b, SharedBlock) else b for b in layers]
        if state is not None and cu_seqlens is None and tokens.shape[1] == 1 and layers is self.layers:
            h, state = step_blocks(self.layers, h, keep_in(state_dtype, state), reuse_state=reuse_state)
            return h, None, state
        states = (None,) * len(layers) if state is None else state
        return read_blocks(layers, h, states, cu_seqlens, state_dtype)

    def _finish(self, h: Tensor, waiting: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """What the output projection takes, in a dtype, by default that of its weight."""
        dtype, scale = self.output_weight.dtype if dtype is None else dtype, self.config.logits_scale
        if waiting is None:
            h = self.norm_f(h)
        else:
            h = add_and_norm(self.norm_f, h, waiting, dtype if scale == 1.0 else h.dtype)[1]
        return (h if scale == 1.0 else h * scale).to(dtype)

    def project_out(self, hidden: Tensor) -> Tensor:
        """Logits `(..., padded_vocab_size)` of what `hidden_states` returns."""
        return project(hidden, self.output_weight) if self.lm_head is None else apply_linear(self.lm_head, hidden)

    @property
    def _head_is_plain(self) -> bool:
        """Whether the output projection is its weight and nothing else."""
        return self.lm_head is None or is_plain_linear(self.lm_head)

    def _embed(self, tokens: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        try:
            return embed(tokens)
        except IndexError as error:
            rows = self.embedding.num_embeddings
            wrong = tokens[(tokens < 0) | (tokens >= rows)][0].item()
            raise ValueError(f"token {wrong} is not in 0 to {rows - 1}; use this model's own tokenizer.") from error

    @property
    def output_weight(self) -> Tensor:
        """`(padded_vocab_size, d_model)`: the output projection, the embedding itself if tied."""
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> Tensor:
        """Cross-entropy in nats of the targets, summed in float32.

        Args:
            tokens: `(batch, seqlen)` int64 inputs.
            targets: `(batch, seqlen)` int64, the token after each input; `ignore_index` leaves a position out.
            cu_seqlens: as in `forward`.
            ignore_index: the target that does not count.
            reduction: "mean" over the targets that count, or "sum".

        Returns:
            A scalar.

        Note:
            More than 2^27 logits (0.5 GB in float32, of which a plain loss keeps several copies) exist for a block of
            tokens at a time, and with gradients in the dtype of the hidden states: see `linear_cross_entropy`.
        """
        if self._head_is_plain and targets.numel() * self.output_weight.shape[0] > MOST_LOGITS:
            hidden, weight = self._hidden_states_and_head(tokens, cu_seqlens)
            return linear_cross_entropy(hidden, weight, targets, ignore_index=ignore_index, reduction=reduction)
        hidden, _ = self.hidden_states(tokens, cu_seqlens=cu_seqlens)
        logits = self.project_out(hidden).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction=reduction)

    def _hidden_states_and_head(self, tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden states in the dtype of products, and the output projection's weight for one `linear_cross_entropy`.

        A tied weight gets one gradient, in which the embedding's rows are added to those of the loss.
        """
        weight = self.output_weight

        def embed(tokens: Tensor) -> Tensor:
            nonlocal weight
            h, weight = tied_embedding(tokens, weight)
            return h

        h, waiting, _ = self._read(tokens, None, cu_seqlens, False, None, embed if self._may_tie_gradients else None)
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        return self._finish(h, waiting, dtype), weight

    @property
    def _may_tie_gradients(self) -> bool:
        """Whether the embedding is its tied weight's rows and nothing else, which gets a gradient."""
        module = self.embedding
        if self.lm_head is not None or type(module) is not nn.Embedding or "forward" in module.__dict__:
            return False
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return False
        if module.max_norm is not None or module.padding_idx is not None or module.sparse or module.scale_grad_by_freq:
            return False
        weight = module.weight
        return torch.is_grad_enabled() and weight.requires_grad and unwatched((weight,))

    def generate(self, tokens: Tensor, **options: Any) -> "GenerateOutput":
        """Continues prompts; see `dualscan.generate.engine.generate` for the options."""
        from dualscan.generate.engine import generate

        return generate(self, tokens, **options)

    def save(self, folder: str | Path, *, format: str = "dualscan") -> None:
        """Writes weights and `config.json` into a folder; see `dualscan.models.weights.save`."""
        from dualscan.models.weights import save

        save(self, folder, format=format)
