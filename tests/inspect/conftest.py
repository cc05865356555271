"""A small hybrid at a short text, and its page."""

from pathlib import Path

import pytest
import torch

from dualscan.data.tokenizer import ByteTokenizer
from dualscan.inspect.page import token_labels, write_page
from dualscan.inspect.report import Inspection, inspect
from dualscan.models.config import ModelConfig
from dualscan.models.lm import MambaLM

# What a page could stumble over: markup, an entity, white space, a character of two bytes.
TEXT = "</script><b>a&amp;b</b>\n\tné " + "x" * 21
TOKENIZER = ByteTokenizer()
TOKENS = [TOKENIZER.eos_id, *TOKENIZER.encode(TEXT)]


@pytest.fixture(scope="session")
def seen() -> Inspection:
    torch.manual_seed(4)
    sizes = {"d_model": 32, "vocab_size": 257, "d_state": 8, "headdim": 8, "n_heads": 2, "embedding_std": 1.0}
    # In float64, where no kernel has to be compiled first.
    model = MambaLM(ModelConfig(pattern="MM*-M", **sizes)).double()
    return inspect(model, torch.tensor(TOKENS), target=TOKENIZER.encode("<")[0], resolution=20)


@pytest.fixture(scope="session")
def page_file(seen: Inspection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    words = {token: token_labels(TOKENIZER, [token])[0] for token in (seen.target, *dict(seen.predictions))}
    write_page(path, seen, token_labels(TOKENIZER, TOKENS), words=words, title="a <small> model", about="for tests")
    return path
