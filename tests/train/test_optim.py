"""Decay groups and an optimizer state that survives storage bit for bit."""

import pytest
import torch
from torch import nn

from dualscan.train.optim import adamw, decay_groups, load_state_tensors, state_tensors


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.A_log = nn.Parameter(torch.rand(3))
        self.dt_bias = nn.Parameter(torch.rand(3))
        self.D = nn.Parameter(torch.rand(3, 4))
        self.norm = nn.RMSNorm(4)
        self.out_proj = nn.Linear(4, 4)
        self.frozen = nn.Parameter(torch.rand(2, 2), requires_grad=False)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.mixer = Mixer()
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = self.mixer.norm(self.mixer.out_proj(x)) * self.mixer.D.sum() * self.mixer.dt_bias.sum()
        return self.head(x * self.mixer.A_log.sum())


def test_matrices_decay_and_nothing_else():
    decayed, kept = decay_groups(Model().named_parameters(), 0.1)
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    assert {name for name, _ in decayed["params"]} == {"embedding.weight", "mixer.out_proj.weight"}
    assert {name for name, _ in kept["params"]} == {
        "mixer.A_log",
        "mixer.dt_bias",
        "mixer.D",
        "mixer.norm.weight",
        "mixer.out_proj.bias",
    }


def test_decay_is_decoupled_and_only_where_it_belongs():
    """A step with zero gradient changes decayed parameters by exactly lr * weight_decay, the others not at all."""
    model = Model()
    optimizer = adamw(model, lr=0.5, betas=(0.9, 0.95), weight_decay=0.25)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1 - 0.5 * 0.25 if name in ("embedding.weight", "mixer.out_proj.weight") else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor)


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        tokens = torch.randint(0, 5, (4, 6), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_state_round_trips_bit_for_bit():
    model = Model()
    optimizer = adamw(model, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    train(model, optimizer, 3)
    stored = {name: value.clone() for name, value in state_tensors(optimizer).items()}
    twin = Model()
    twin.load_state_dict(model.state_dict())
    resumed = adamw(twin, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    load_state_tensors(resumed, stored)
    assert train(twin, resumed, 4, first=3) == train(model, optimizer, 4, first=3)
    assert stored["embedding.weight|step"].item() == 3, "the stored tensors were adopted, not copied"


def test_state_of_another_model_is_recognised():
    model = Model()
    optimizer = adamw(model, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    train(model, optimizer, 1)
    stored = state_tensors(optimizer)
    with pytest.raises(ValueError, match=r"no optimizer state for parameter 'mixer\.D'"):
        load_state_tensors(optimizer, {name: value for name, value in stored.items() if "mixer.D" not in name})
    with pytest.raises(ValueError, match=r"'mixer.D' has shape \(9, 9\), the parameter \(3, 4\)"):
        load_state_tensors(optimizer, {**stored, "mixer.D|exp_avg": torch.zeros(9, 9)})
