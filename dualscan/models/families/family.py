"""What the package knows of another program's checkpoints: their settings and the names of their tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dualscan.models.config import ModelConfig
from dualscan.models.families.layout import Layout
from dualscan.models.families.settings import Settings
from dualscan.models.tensors import SAFETENSORS


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A kind of checkpoint.

    Attributes:
        name: how it is called: the `model_type` of transformers, or the program.
        checkpoints: a few that are published.
        config: its `config.json` as our configuration; raises ValueError for what cannot be expressed here.
        to_config: a `config.json` for one of our configurations, where that is possible; see `families.express`.
        takes: the patterns of our models that it can express.
        layout: the names of its tensors.
        weights: the file that it is saved as.
        aliases: names that some files use for a tensor -> the name that they should.
        head_when_tied: it stores the output projection also where that is the embedding.
        differences: where the model here computes something else than the family's own code, on purpose.
    """

    name: str
    checkpoints: str
    config: Callable[[Settings], ModelConfig]
    to_config: Callable[[ModelConfig], dict[str, Any]]
    takes: str
    layout: Callable[[ModelConfig], Layout]
    weights: str = SAFETENSORS
    aliases: Mapping[str, str] = field(default_factory=dict)
    head_when_tied: bool = False
    differences: str = ""
