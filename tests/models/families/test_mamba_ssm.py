"""mamba_ssm's layout, which no package here can write: the same weights under transformers' names, and attention and
MLP written out from their definitions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

import dualscan
from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM
from tests.models.test_weights import same, write_config
from tests.oracle import relative_error

D, V = 24, 37
BASE = {"d_model": D, "n_layer": 3, "vocab_size": V, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
CASES: dict[str, dict[str, Any]] = {
    "mamba2": {"ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8, "ngroups": 3}, "pad_vocab_size_multiple": 16},
    "mamba2 with attention": {
        "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8, "bias": True},
        "attn_layer_idx": [1],
        "attn_cfg": {
            "causal": True,
            "d_conv": 4,
            "head_dim": 12,
            "num_heads": 3,
            "num_heads_kv": 1,
            "rotary_emb_dim": 8,
            "qkv_proj_bias": False,
            "out_proj_bias": False,
        },
    },
    "mamba2 with attention and MLPs, untied": {
        "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8, "ngroups": 2, "conv_bias": False},
        "d_intermediate": 100,
        "attn_layer_idx": [0, 2],
        "attn_cfg": {"causal": True, "num_heads": 4, "softmax_scale": 0.3},
        "tie_embeddings": False,
    },
    "mamba": {"ssm_cfg": {"d_state": 8}, "pad_vocab_size_multiple": 8},
}


class Reference(nn.Module):
    """The model under mamba_ssm's names: mixers of transformers, the rest as the definitions say."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        multiple = config.get("pad_vocab_size_multiple", 8)
        rows = -(-V // multiple) * multiple
        self.backbone: Any = nn.Module()
        self.backbone.embedding = nn.Embedding(rows, D)
        self.backbone.layers = nn.ModuleList(self._block(i) for i in range(config["n_layer"]))
        self.backbone.norm_f = nn.RMSNorm(D, eps=1e-5)
        self.lm_head: Any = nn.Linear(D, rows, bias=False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.2) + (p.ndim == 1))
        if config.get("tie_embeddings", True):
            embedding: Any = self.backbone.embedding
            self.lm_head.weight = embedding.weight

    def _block(self, index: int) -> Any:
        block: Any = nn.Module()
        ssm = self.config["ssm_cfg"]
        block.norm = nn.RMSNorm(D, eps=1e-5)
        if index in self.config.get("attn_layer_idx", ()):
            attention = self.config["attn_cfg"]
            heads = attention["num_heads"] + 2 * attention.get("num_heads_kv", attention["num_heads"])
            head_dim = attention.get("head_dim", D // attention["num_heads"])
            block.mixer = nn.Module()
            block.mixer.in_proj = nn.Linear(D, heads * head_dim, bias=attention.get("qkv_proj_bias", True))
            width = attention["num_heads"] * head_dim
            block.mixer.out_proj = nn.Linear(width, D, bias=attention.get("out_proj_bias", True))
            if attention.get("d_conv"):
                channels = heads * head_dim
                block.mixer.conv1d = nn.Conv1d(channels, channels, attention["d_conv"], groups=channels)
        elif ssm.get("layer") == "Mamba2":
            settings = {
                "hidden_size": D,
                "num_heads": 2 * D // 8,
                "head_dim": 8,
                "state_size": 8,
                "num_hidden_layers": 3,
                "n_groups": ssm.get("ngroups", 1),
                "use_bias": ssm.get("bias", False),
                "chunk_size": 8,
                "use_conv_bias": ssm.get("conv_bias", True),
            }
            block.mixer = Mamba2Mixer(Mamba2Config(**settings), layer_idx=index)
        else:
            block.mixer = MambaMixer(MambaConfig(hidden_size=D, state_size=8), layer_idx=index)
        if self.config.get("d_intermediate"):
            hidden = -(-self.config["d_intermediate"] // 128) * 128
            block.norm2, block.mlp = nn.RMSNorm(D, eps=1e-5), nn.Module()
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(D, 2 * hidden, bias=False), nn.Linear(hidden, D, bias=False)
        return block

    def forward(self, ids: Tensor) -> Tensor:
        h = self.backbone.embedding(ids)
        for block in self.backbone.layers:
            u = block.norm(h)
            h = h + (
                block.mixer(u) if isinstance(block.mixer, (Mamba2Mixer, MambaMixer)) else self._attend(block.mixer, u)
            )
            if hasattr(block, "mlp"):
                up, gate = block.mlp.fc1(block.norm2(h)).chunk(2, dim=-1)
                h = h + block.mlp.fc2(up * F.silu(gate))
        return self.lm_head(self.backbone.norm_f(h))

    def _attend(self, mixer: Any, u: Tensor) -> Tensor:
        settings = self.config["attn_cfg"]
        heads = settings["num_heads"]
        kv_heads = settings.get("num_heads_kv", heads)
        head_dim = mixer.out_proj.in_features // heads
        qkv = mixer.in_proj(u)
        if hasattr(mixer, "conv1d"):
            qkv = mixer.conv1d(F.pad(qkv.mT, (settings["d_conv"] - 1, 0))).mT
        q, k, v = qkv.unflatten(-1, (-1, head_dim)).transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
        turned = settings.get("rotary_emb_dim", 0)
        if turned:
            angle = torch.arange(u.shape[1])[:, None] / 10000 ** (torch.arange(0, turned, 2) / turned)
            turn = torch.polar(torch.ones_like(angle), angle)

            def rotated(x: Tensor) -> Tensor:
                pair = torch.complex(*x[..., :turned].chunk(2, dim=-1)) * turn
                return torch.cat((pair.real, pair.imag, x[..., turned:]), dim=-1)

            q, k = rotated(q), rotated(k)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        scores = q @ k.mT * (settings.get("softmax_scale") or head_dim**-0.5)
        scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf)
        return mixer.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


def written(case: str, folder: Path) -> Reference:
    config = {**BASE, **CASES[case]}
    model = Reference(config).eval()
    write_config(folder, config)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_steps_and_gradients(case: str, tmp_path: Path) -> None:
    theirs = written(case, tmp_path)
    ours, ids = dualscan.load(tmp_path), torch.randint(V, (2, 13))
    expected = theirs(ids)
    assert relative_error(ours(ids).logits, expected) <= 1e-5
    with torch.inference_mode():
        pieces, state = [], None
        for piece in ids.split([6, 5, 1, 1], dim=1):
            logits, state = ours(piece, state=state)
            pieces.append(logits)
    assert relative_error(torch.cat(pieces, dim=1), expected) <= 1e-5
    F.cross_entropy(expected.flatten(0, 1), ids.flatten()).backward()
    ours.loss(ids, ids).backward()
    with torch.no_grad():
        for p in (*ours.parameters(), *theirs.parameters()):
            p.copy_(p.grad)
    ours.save(tmp_path / "gradients", format="source")
    actual = torch.load(tmp_path / "gradients" / "pytorch_model.bin", weights_only=True)
    for name, gradient in theirs.state_dict().items():
        assert relative_error(actual[name], gradient) <= 1e-4, name


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_identical(case: str, tmp_path: Path) -> None:
    before = written(case, tmp_path).state_dict()
    dualscan.load(tmp_path).save(tmp_path / "ours")
    dualscan.load(tmp_path / "ours").save(tmp_path / "back", format="source")
    after = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert dualscan.load(tmp_path / "back").source == dualscan.load(tmp_path).source


@pytest.mark.parametrize(
    ("settings", "family"),
    [
        ({"pattern": "MM", "tie_embeddings": False, "ngroups": 2}, "mamba2"),
        ({"pattern": "mm", "d_state": 4}, "mamba"),
        ({"pattern": "M*-M-", "rope_theta": 100.0, "d_mlp": 128}, None),
        ({"pattern": "M-*-M-", "rope_theta": 100.0, "d_mlp": 128}, "mamba_ssm"),
        ({"pattern": "MM*", "attention_conv": 4, "vocab_multiple": 16, "dt_limit": (0.0, 0.5)}, "mamba_ssm"),
        ({"pattern": "mm", "dt_rank": 3}, "mamba_ssm"),
    ],
)
def test_models_made_here_go_there(settings: dict[str, Any], family: str | None, tmp_path: Path) -> None:
    sizes = {"d_model": 32, "vocab_size": 50, "vocab_multiple": 1, "d_state": 8, "headdim": 16, "n_heads": 2}
    model = MambaLM(ModelConfig(**{**sizes, **settings})).eval()
    if family is None:
        with pytest.raises(ValueError, match="mamba_ssm cannot express this model: pattern='M\\*-M-'"):
            model.save(tmp_path, format="mamba_ssm")
        return
    model.save(tmp_path, format=family)
    loaded, ids = dualscan.load(tmp_path), torch.randint(50, (1, 7))
    assert loaded.source is not None
    assert loaded.source.family == family
    assert torch.equal(loaded(ids).logits[..., :50], model(ids).logits[..., :50])
    if family != "mamba_ssm":
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert relative_error(loaded(ids).logits, theirs(ids).logits) <= 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"pattern": "MM*", "n_heads": 2, "n_kv_heads": 1, "rope_theta": 1e4, "rotary_dim": 8, "attention_conv": 3},
        {"pattern": "M-*-M-", "n_heads": 3, "attention_scale": 0.3, "attention_bias": True, "d_mlp": 128},
        {"pattern": "*-", "n_heads": 2, "tie_embeddings": False, "ngroups": 2, "d_mlp": 256},
    ],
    ids=lambda settings: settings["pattern"],
)
def test_hybrids_made_here_compute_the_same_there(settings: dict[str, Any], tmp_path: Path) -> None:
    config = ModelConfig(d_model=D, vocab_size=V, vocab_multiple=4, d_state=8, headdim=8, **settings)
    model, ids = MambaLM(config).eval(), torch.randint(V, (2, 13))
    model.save(tmp_path, format="mamba_ssm")
    theirs = Reference(json.loads((tmp_path / "config.json").read_text())).eval()
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert theirs.load_state_dict(weights, strict=True)
    assert relative_error(model(ids).logits, theirs(ids)) <= 1e-5
    same(dualscan.load(tmp_path), model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rms_norm": False}, "rms_norm=False: LayerNorm is not supported"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "layer='Mamba3'"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 8}}, "d_ssm=8: a gated MLP inside"),
        ({"ssm_cfg": {"layer": "Mamba2", "colour": 8}}, "colour=8: this setting"),
        ({"attn_layer_idx": [9]}, r"attn_layer_idx=\[9\] but n_layer=3"),
        ({"attn_layer_idx": [1], "attn_cfg": {"num_heads": 2}}, "causal=False"),
        ({"ssm_cfg": 3}, "ssm_cfg=3; expected an object"),
        ({"d_model": None}, "has no 'd_model'"),
        ({"n_layer": "3"}, "wrong type"),
    ],
)
def test_what_is_out_of_reach_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    written("mamba2", tmp_path)
    write_config(tmp_path, {**BASE, **CASES["mamba2"], **changes})
    with pytest.raises(ValueError, match=words) as raised:
        dualscan.load(tmp_path)
    assert str(tmp_path / "config.json") in str(raised.value)
