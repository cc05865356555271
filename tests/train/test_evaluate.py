"""Bits per byte against their definition."""

import math

import pytest
import torch

from dualscan.data.packing import TokenStream
from dualscan.data.sources import Document
from dualscan.data.tokenizer import ByteTokenizer
from dualscan.models.lm import MambaLM
from dualscan.models.presets import preset
from dualscan.train.evaluate import Evaluation, evaluate
from dualscan.train.runtime import pick_precision
from tests.oracle import CAPS

TEXTS = ["To be, or not to be: thé question.", "x", "A second document, a little longer than the first one."]
FP32 = pick_precision("fp32", torch.device("cpu"))


@pytest.fixture(scope="module")
def model() -> MambaLM:
    torch.manual_seed(0)
    return MambaLM(preset("tiny"))


@pytest.fixture(scope="module")
def source() -> TokenStream:
    return TokenStream.from_documents([Document(text, "") for text in TEXTS], ByteTokenizer())


def nll_of(model: MambaLM, inputs: list[int], targets: list[int]) -> float:
    logits = model(torch.tensor([inputs])).logits[0].double().log_softmax(-1)
    return -sum(logits[i, target].item() for i, target in enumerate(targets))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_windows_are_scored_by_themselves(model, source, batch_size):
    """By hand: the stream with an end mark after each document, cut into windows of 16, each from a fresh state."""
    eos = ByteTokenizer.eos_id
    targets = [token for text in TEXTS for token in [*text.encode(), eos]]
    inputs = [eos, *targets[:-1]]
    with torch.no_grad():
        expected = sum(
            nll_of(model, inputs[start : start + 16], targets[start : start + 16])
            for start in range(0, len(targets), 16)
        )
    result = evaluate(model, source, ByteTokenizer(), seqlen=16, batch_size=batch_size, precision=FP32)
    nbytes = sum(len(text.encode()) for text in TEXTS)
    assert (result.tokens, result.nbytes) == (len(targets), nbytes)
    assert result.nll == pytest.approx(expected, rel=CAPS[torch.float32][0])
    assert result.bits_per_byte == pytest.approx(expected / math.log(2) / nbytes, rel=CAPS[torch.float32][0])


def test_packed_documents_are_scored_by_themselves(model, source):
    eos = ByteTokenizer.eos_id
    with torch.no_grad():
        expected = sum(nll_of(model, [eos, *text.encode()], [*text.encode(), eos]) for text in TEXTS)
    result = evaluate(model, source, ByteTokenizer(), seqlen=256, batch_size=1, precision=FP32, packed=True)
    assert result.nll == pytest.approx(expected, rel=CAPS[torch.float32][0])


def test_a_part_is_the_beginning(model, source):
    options = {"seqlen": 8, "batch_size": 2, "precision": FP32}
    part = evaluate(model, source, ByteTokenizer(), max_tokens=20, **options)
    assert part.tokens == 32, "whole batches of 16 tokens"
    assert part.nbytes == 32, "thirty-two bytes of the first document, which has no end mark before its 36th"


def test_a_uniform_model_has_log2_of_the_vocabulary(model, source):
    uniform = MambaLM(preset("tiny"))
    with torch.no_grad():
        uniform.embedding.weight.zero_()
    result = evaluate(uniform, source, ByteTokenizer(), seqlen=32, batch_size=1, precision=FP32)
    rows = uniform.config.padded_vocab_size
    assert result.perplexity == pytest.approx(rows, rel=CAPS[torch.float32][0])


def test_units():
    result = Evaluation(nll=100 * math.log(2.0), tokens=50, nbytes=200)
    assert result.bits_per_byte == pytest.approx(0.5)
    assert result.perplexity == pytest.approx(4.0)
