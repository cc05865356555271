"""The stream convention and its windows, against plain Python loops over the documents."""

import itertools
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualscan.data.packing import (
    IGNORE_INDEX,
    TokenSource,
    TokenStream,
    TokenView,
    bytes_before,
    gather_windows,
    token_dtype,
    window_cu_seqlens,
)
from dualscan.data.sources import Document
from dualscan.data.tokenizer import ByteTokenizer
from tests.data.strategies import EOS, document_ids, streams, texts


def sequential(stream: TokenSource, seqlen: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    starts = np.arange(0, len(stream), seqlen)
    inputs, targets = gather_windows(stream, starts, seqlen)
    return inputs, targets, window_cu_seqlens(stream, starts, seqlen)


@given(documents=document_ids, seqlen=st.integers(1, 20))
def test_windows_hold_every_document_with_its_end(documents, seqlen):
    stream = TokenStream.from_ids(documents, eos_id=EOS)
    inputs, targets, _ = sequential(stream, seqlen)
    kept = targets.ravel() != IGNORE_INDEX
    assert targets.ravel()[kept].tolist() == [token for document in documents for token in (*document, EOS)]
    assert inputs.ravel()[kept].tolist() == [token for document in documents for token in (EOS, *document)]
    # Padding stands at the end only, and feeds the end-of-document id.
    assert kept.tolist() == sorted(kept.tolist(), reverse=True)
    assert (inputs.ravel()[~kept] == EOS).all()
    assert (inputs.dtype, targets.dtype) == (np.int64, np.int64)


@given(documents=document_ids, seqlen=st.integers(1, 20))
def test_packed_sequences_are_the_documents_cut_at_windows(documents, seqlen):
    """Each sequence between boundaries is a piece of one document, from its start or a window's."""
    stream = TokenStream.from_ids(documents, eos_id=EOS)
    inputs, targets, cu_seqlens = sequential(stream, seqlen)
    assert cu_seqlens.dtype == np.int32
    pieces = []
    position = 0
    for document in documents:
        pairs = list(zip((EOS, *document), (*document, EOS), strict=True))
        while pairs:
            room = seqlen - position % seqlen
            pieces.append(pairs[:room])
            position += len(pieces[-1])
            pairs = pairs[room:]
    if position % seqlen:
        pieces.append([(EOS, IGNORE_INDEX)] * (seqlen - position % seqlen))
    rows = list(zip(inputs.ravel().tolist(), targets.ravel().tolist(), strict=True))
    cuts = cu_seqlens.tolist()
    assert [rows[start:stop] for start, stop in itertools.pairwise(cuts)] == pieces


@given(stream=streams(), seqlen=st.integers(1, 20), data=st.data())
def test_any_windows_in_any_order(stream, seqlen, data):
    starts = np.array(data.draw(st.lists(st.integers(0, len(stream) - 1), min_size=1, max_size=5)))
    inputs, targets = gather_windows(stream, starts, seqlen)
    padded_targets = [*stream.tokens.tolist(), *[IGNORE_INDEX] * seqlen]
    padded_inputs = [EOS, *stream.tokens.tolist()[:-1], *[EOS] * seqlen]
    assert targets.tolist() == [padded_targets[start : start + seqlen] for start in starts]
    assert inputs.tolist() == [padded_inputs[start : start + seqlen] for start in starts]
    boundaries = {*stream.document_starts.tolist(), len(stream)}
    expected = [
        row * seqlen + offset
        for row, start in enumerate(starts.tolist())
        for offset in range(seqlen)
        if offset == 0 or start + offset in boundaries
    ]
    assert window_cu_seqlens(stream, starts, seqlen).tolist() == [*expected, len(starts) * seqlen]


@given(documents=st.lists(texts, min_size=1, max_size=6), data=st.data())
def test_bytes_before_counts_utf8_exactly_for_bytes(documents, data):
    stream = TokenStream.from_documents([Document(text, "d") for text in documents], ByteTokenizer())
    lengths = ByteTokenizer().byte_lengths()
    position = data.draw(st.integers(0, len(stream)))
    assert bytes_before(stream, np.array([position])).item() == lengths[stream.tokens[:position]].sum()
    assert bytes_before(stream, np.array([len(stream)])).item() == sum(len(text.encode()) for text in documents)


@given(documents=document_ids, data=st.data())
def test_bytes_before_is_exact_at_documents_for_any_tokenizer(documents, data):
    nbytes = [data.draw(st.integers(1, 100)) for _ in documents]
    stream = TokenStream.from_ids([[1, *document] for document in documents], eos_id=EOS, nbytes=nbytes)
    at_starts = bytes_before(stream, np.append(stream.document_starts, len(stream)))
    assert at_starts.tolist() == [0, *np.cumsum(nbytes).tolist()]
    everywhere = bytes_before(stream, np.arange(len(stream) + 1))
    assert (np.diff(everywhere) >= 0).all()


@given(stream=streams(), data=st.data())
def test_a_view_is_the_documents_alone(stream, data):
    count = len(stream.document_starts)
    first = data.draw(st.integers(0, count - 1))
    last = data.draw(st.integers(first + 1, count))
    view = TokenView(stream, first, last)
    ends = [*stream.document_starts.tolist(), len(stream)]
    alone = TokenStream(
        stream.tokens[ends[first] : ends[last]],
        stream.document_starts[first:last] - ends[first],
        stream.document_nbytes[first:last],
        EOS,
    )
    assert (len(view), view.eos_id) == (len(alone), EOS)
    assert view.document_nbytes.tolist() == alone.document_nbytes.tolist()
    for ours, theirs in zip(sequential(view, 5), sequential(alone, 5), strict=True):
        assert ours.tolist() == theirs.tolist()


@given(documents=st.lists(texts, min_size=1, max_size=6))
def test_from_documents_round_trips(documents):
    tokenizer = ByteTokenizer()
    stream = TokenStream.from_documents((Document(text, "d") for text in documents), tokenizer)
    assert stream.tokens.dtype == np.uint16
    ends = [*stream.document_starts.tolist(), len(stream)]
    spans = [stream.tokens[a:b] for a, b in itertools.pairwise(ends)]
    assert [tokenizer.decode(span[:-1]) for span in spans] == documents
    assert all(span[-1] == tokenizer.eos_id for span in spans)
    assert stream.document_nbytes.tolist() == [len(text.encode()) for text in documents]


def test_many_characters_are_encoded_in_order():
    """More than one batch of the encoder."""
    documents = [Document(chr(97 + n % 26) * 300_000, "d") for n in range(9)]
    stream = TokenStream.from_documents(documents, ByteTokenizer())
    assert len(stream) == 9 * 300_001
    assert stream.tokens[stream.document_starts].tolist() == [ord(document.text[0]) for document in documents]


def test_dtype_follows_the_vocabulary():
    assert [token_dtype(size) for size in (257, 65536, 65537)] == [np.uint16, np.uint16, np.uint32]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": np.array([1.0, 9.0])}, TypeError, "tokens must be a numpy array of integers, got float64"),
        ({"tokens": [1, 9]}, TypeError, "tokens must be a numpy array of integers, got list"),
        ({"tokens": np.zeros((1, 2), dtype=int)}, ValueError, r"tokens has shape \(1, 2\)"),
        ({"tokens": np.array([], dtype=int)}, ValueError, "at least one entry"),
        ({"document_starts": np.array([1, 2])}, ValueError, "must ascend from 0 to below 4"),
        ({"document_starts": np.array([0, 0])}, ValueError, "must ascend"),
        ({"document_starts": np.array([0, 4])}, ValueError, "must ascend"),
        ({"document_starts": np.array([0])}, ValueError, "document_nbytes has 2 entries, document_starts 1"),
        ({"eos_id": 8}, ValueError, "document 0 ends with id 9, not with eos_id=8"),
    ],
)
def test_stream_refuses(change, error, message):
    good: dict[str, Any] = {
        "tokens": np.array([1, 9, 2, 9]),
        "document_starts": np.array([0, 2]),
        "document_nbytes": np.array([1, 1]),
        "eos_id": 9,
    }
    TokenStream(**good)
    with pytest.raises(error, match=message):
        TokenStream(**{**good, **change})


def test_no_documents():
    with pytest.raises(ValueError, match="there is no document"):
        TokenStream.from_documents([], ByteTokenizer())


@pytest.mark.parametrize("span", [(0, 0), (1, 3), (-1, 1)])
def test_view_refuses(span):
    stream = TokenStream.from_ids([[1], [2]], eos_id=EOS)
    with pytest.raises(ValueError, match=re.escape(f"documents [{span[0]}, {span[1]}) of a source of 2")):
        TokenView(stream, *span)
