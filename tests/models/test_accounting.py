"""What a model costs, counted from the configuration, against the model itself."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dualscan.models import accounting
from dualscan.models.config import ModelConfig
from dualscan.models.layers import blocks
from dualscan.models.lm import MambaLM
from dualscan.models.presets import PRESETS, preset
from dualscan.nn.block import set_recompute
from tests.models.test_config import PUBLISHED
from tests.nn.test_recompute import Alive

# What PyTorch's counter lacks or counts otherwise: products in place, and the norms, which are elementwise.
ADJUSTED = {
    torch.ops.aten.baddbmm_: lambda out, a, b, *_, **__: 2 * out[0] * out[1] * out[2] * a[2],
    torch.ops.dualscan.rms_norm_fwd: lambda *_, **__: 0,
    torch.ops.dualscan.rms_norm_bwd: lambda *_, **__: 0,
}
SIZES: dict[str, Any] = {"d_model": 32, "vocab_size": 50, "d_state": 16, "headdim": 8, "chunk_size": 8}
PATTERNS = {
    "mamba2": {"pattern": "MM"},
    "groups": {"pattern": "M", "ngroups": 4, "d_conv": 3},
    "head pattern": {"pattern": "MM", "head_pattern": "multi-query"},
    "feature map": {"pattern": "M", "head_pattern": "multi-state", "feature_map": "silu+taylor"},
    "mamba": {"pattern": "mm"},
    "both": {"pattern": "mM", "d_conv": 3, "dt_rank": 5},
    "attention": {"pattern": "**", "n_heads": 4, "n_kv_heads": 2},
    "mlp": {"pattern": "-M", "d_mlp": 40},
    "wide attention": {"pattern": "*", "n_heads": 3, "n_kv_heads": 1, "head_dim": 16, "attention_conv": 4},
    "biases": {"pattern": "M*-", "mamba_bias": True, "conv_bias": False, "attention_bias": True, "mlp_bias": True},
    "experts": {"pattern": "E", "n_experts": 4, "experts_per_token": 2, "d_expert": 24, "d_shared": 16},
    "side by side": {"pattern": "P-", "n_heads": 2, "branch_scales": (1.0, 0.5, 2.0, 1.0)},
    "shared": {
        "pattern": "MSSS",
        "n_heads": 4,
        "head_dim": 8,
        "n_shared": 2,
        "adapter_rank": 3,
        "attention_adapters": True,
    },
    "hybrid": {"pattern": "M*-M", "tie_embeddings": False, "n_heads": 2},
}


def model_of(pattern: str) -> MambaLM:
    return MambaLM(ModelConfig(**SIZES, **PATTERNS[pattern]))


def flops(run: Callable[[], Any]) -> int:
    """What PyTorch counts; only the written-out form of attention shows its products to the counter."""
    with FlopCounterMode(display=False, custom_mapping=ADJUSTED) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def skipped_half(config: ModelConfig, seqlen: int, batch: int) -> int:
    """The upper triangles of attention's two products, which that form computes and a causal one need not."""
    width = config.n_heads * config.head_dim if config.n_heads and config.head_dim else config.d_model
    return (
        sum(kind in ("attention", "parallel", "shared") for kind in config.layer_types)
        * 2
        * batch
        * seqlen
        * seqlen
        * width
    )


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_every_preset(name: str) -> None:
    with torch.device("meta"):
        model = MambaLM(preset(name))
    counted = accounting.parameters(preset(name))
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.embedding == model.embedding.weight.numel()
    assert counted.layers == sum(p.numel() for p in model.layers.parameters())
    if name in PUBLISHED:
        assert counted.total == PUBLISHED[name][2]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_parameters_of_every_layer(pattern: str) -> None:
    model = model_of(pattern)
    counted = accounting.parameters(model.config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.layers == sum(p.numel() for p in model.layers.parameters())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seqlen", [16, 5])
def test_forward_flops(pattern: str, seqlen: int) -> None:
    model, batch = model_of(pattern), 3
    tokens = torch.randint(50, (batch, seqlen))
    counted = accounting.forward_flops_per_sequence(model.config, seqlen, batch=batch)
    half = skipped_half(model.config, seqlen, batch)
    assert flops(lambda: model(tokens)) - half == counted
    last = accounting.forward_flops_per_sequence(model.config, seqlen, batch=batch, logits=1)
    assert flops(lambda: model(tokens, logits_to_keep=1)) - half == last
    assert last < counted


@pytest.mark.parametrize("pattern", ["mamba2", "mamba", "groups", "head pattern", "feature map", "mlp"])
def test_training_flops(pattern: str) -> None:
    model, batch, seqlen = model_of(pattern), 2, 16
    tokens = torch.randint(50, (batch, seqlen))
    counted = accounting.training_flops_per_sequence(model.config, seqlen, batch=batch)
    assert flops(lambda: model.loss(tokens, tokens).backward()) == counted


@pytest.mark.parametrize("pattern", PATTERNS)
def test_step_flops(pattern: str) -> None:
    # Two rows: a single one is multiplied as a vector, which the counter leaves out.
    model, batch, context = model_of(pattern), 2, 7
    # With gradients: the step without them has no operator for the convolution, so that it is not counted.
    _, state = model(torch.randint(50, (batch, context)))
    token = torch.randint(50, (batch, 1))
    counted = accounting.step_flops(model.config, context=context, batch=batch)
    assert flops(lambda: model(token, state=state)) == counted


def tensors(state: Any) -> Iterator[Tensor]:
    for entry in state:
        if isinstance(entry, Tensor):
            yield entry
        elif entry is not None:
            yield from tensors(entry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_state_bytes(pattern: str, dtype: torch.dtype) -> None:
    model, batch = model_of(pattern).to(dtype), 2
    for context in (1, 9):
        _, state = model(torch.randint(50, (batch, context)))
        # Attention's sequence lengths are bookkeeping, not memory that counts.
        held = sum(t.nbytes for t in tensors(state) if t.is_floating_point())
        counted = accounting.state_bytes(model.config, batch=batch, context=context, activation_bytes=dtype.itemsize)
        assert held == counted


RECOMPUTE = ("none", "convolution", "activations", "block")


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_what_training_keeps_is_what_memory_shows(recompute: Any, autocast: bool) -> None:
    """Every byte that more tokens cost, of which 20 a head are those of the forms for CPUs."""
    config = ModelConfig(pattern="MM", **SIZES)
    stack = nn.ModuleList(blocks(config))
    set_recompute(stack, recompute)
    heads = 0 if recompute == "block" else config.n_layers * config.nheads

    def kept(tokens: int) -> int:
        h = torch.randn(1, tokens, 32, requires_grad=True)
        with Alive() as alive, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = h
            for block in stack:
                y, _ = block(y)
        # The first residual stream is a layer's input, and the last one is not.
        return alive.bytes() + h.nbytes - y.nbytes - 20 * heads * tokens

    def predicted(tokens: int) -> int:
        cost = accounting.training_memory(config, tokens=tokens, recompute=recompute, matrix_bytes=2 if autocast else 4)
        return cost.kept

    assert kept(128) - kept(64) == predicted(128) - predicted(64)
    once = 2 * 2 * sum(p.numel() for name, p in stack[0].named_parameters() if "proj" in name)
    assert predicted(0) == (once if autocast and recompute != "block" else 0)


def test_what_training_computes_again() -> None:
    """FLOPs of forward and backward, against those of the run that keeps everything."""
    config = ModelConfig(pattern="MM", **SIZES)
    stack = nn.ModuleList(blocks(config))
    counted = {}
    for recompute in RECOMPUTE:
        set_recompute(stack, recompute)
        y = torch.randn(1, 40, 32)
        with FlopCounterMode(display=False, custom_mapping=ADJUSTED) as counter:
            for block in stack:
                y, _ = block(y)
            y.sum().backward()
        counted[recompute] = counter.get_total_flops()
    for recompute in RECOMPUTE[1:]:
        cost = accounting.training_memory(config, tokens=40, recompute=recompute)
        assert counted[recompute] - counted["none"] == cost.flops


def test_training_memory_knows_its_settings() -> None:
    with pytest.raises(ValueError, match="recompute='all' is unknown"):
        accounting.training_memory(preset("tiny"), tokens=1, recompute="all")
