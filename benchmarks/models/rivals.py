"""mamba_ssm's Mamba-2 layer and language model with our weights, where that package is installed."""

import importlib.util
import sys
import types
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ahead import tune_briefly
from benchmarks.ops.ssd import rival_package
from dualscan.models.lm import MambaLM
from dualscan.nn.mamba2 import Mamba2


@cache
def available() -> bool:
    """Whether mamba_ssm's modules can be used: the package, what it imports, and a GPU for its kernels.

    Where they can, their kernels' tuning is made short: it outlasted whole measurements.
    """
    if not torch.cuda.is_available() or not rival_package() or importlib.util.find_spec("einops") is None:
        return False
    if importlib.util.find_spec("selective_scan_cuda") is None:  # of Mamba; Mamba-2 only imports it
        sys.modules.setdefault("selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    tune_briefly()
    return True


def memory_efficient() -> bool:
    """Whether its memory-efficient path can run, which needs the extension of causal_conv1d."""
    from mamba_ssm.ops.triton import ssd_combined  # pyrefly: ignore[missing-import]

    return ssd_combined.causal_conv1d_fwd_function is not None


def path() -> str:
    """Which way its layer takes, for the record."""
    return "memory-efficient" if memory_efficient() else "fallback without causal_conv1d"


def layer(ours: Mamba2) -> nn.Module:
    """Its layer; maps `(batch, seqlen, d_model)` to the same."""
    from mamba_ssm.modules.mamba2 import Mamba2 as Rival  # pyrefly: ignore[missing-import]

    sizes = {"d_state": ours.d_state, "headdim": ours.headdim, "ngroups": ours.ngroups}
    other = Rival(ours.d_model, **sizes, use_mem_eff_path=memory_efficient(), device=ours.D.device)
    other.load_state_dict(ours.state_dict())
    return other


def language_model() -> tuple[Any, Any]:
    """The class of its language model, and of that one's configuration; the first call takes seconds."""
    from mamba_ssm.models.config_mamba import MambaConfig  # pyrefly: ignore[missing-import]
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel  # pyrefly: ignore[missing-import]

    return MambaLMHeadModel, MambaConfig


class Model(nn.Module):
    """Its language model behind the part of `MambaLM` that a training step uses.

    Args:
        ours: of Mamba-2 layers.
    """

    def __init__(self, ours: MambaLM) -> None:
        super().__init__()
        make_model, make_config = language_model()
        config = ours.config
        mixer = {"d_state": config.d_state, "headdim": config.headdim, "ngroups": config.ngroups}
        self.model = make_model(
            make_config(
                d_model=config.d_model,
                n_layer=config.n_layers,
                vocab_size=config.padded_vocab_size,
                ssm_cfg={"layer": "Mamba2", "use_mem_eff_path": memory_efficient(), **mixer},
                pad_vocab_size_multiple=config.vocab_multiple,
            ),
            device=ours.embedding.weight.device,
        )
        weights = {f"backbone.{name}": t for name, t in ours.state_dict().items()}
        self.model.load_state_dict({**weights, "lm_head.weight": ours.embedding.weight})

    @property
    def embedding(self) -> Any:
        """As in `MambaLM`."""
        return self.model.backbone.embedding

    def loss(self, tokens: Tensor, targets: Tensor, *, cu_seqlens: None, ignore_index: int, reduction: str) -> Tensor:
        """As in `MambaLM`, with PyTorch's loss over all logits at once."""
        logits = self.model(tokens).logits.flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction=reduction)
