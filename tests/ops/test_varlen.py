"""Packed sequences: what `cu_seqlens` may be, and the conversions from it."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualscan.ops.varlen import common_length, sequence_index, sequence_spans, validate_cu_seqlens
from tests.strategies import pack_lengths, packed

quick = settings(max_examples=50, deadline=None, derandomize=True)


def check(cu_seqlens: Any, *, batch: int = 1, seqlen: int = 6) -> None:
    validate_cu_seqlens(cu_seqlens, batch=batch, seqlen=seqlen, device=torch.device("cpu"), name="op")


@quick
@given(pack_lengths())
def test_conversions_agree(lengths: list[int]) -> None:
    bounds, seqlen = packed(lengths), sum(lengths)
    check(bounds, seqlen=seqlen)
    spans = sequence_spans(bounds, seqlen)
    assert [end - start for start, end in spans] == lengths
    index = sequence_index(bounds, seqlen)
    assert index.dtype == torch.int64
    assert index.tolist() == [i for i, length in enumerate(lengths) for _ in range(length)]
    assert common_length(spans) == (lengths[0] if len(set(lengths)) == 1 else None)


def test_no_sequences_and_one() -> None:
    assert sequence_spans(None, 7) == [(0, 7)]
    assert sequence_spans(packed([]), 0) == []
    assert common_length([]) is None
    assert sequence_index(packed([]), 0).tolist() == []


@quick
@given(st.lists(st.integers(-3, 9), min_size=1, max_size=6), st.integers(0, 9))
def test_exactly_the_good_boundaries_pass(values: list[int], seqlen: int) -> None:
    good = values[0] == 0 and values[-1] == seqlen and values == sorted(values)
    if good:
        check(torch.tensor(values, dtype=torch.int32), seqlen=seqlen)
    else:
        with pytest.raises(ValueError, match="op: cu_seqlens"):
            check(torch.tensor(values, dtype=torch.int32), seqlen=seqlen)


@pytest.mark.parametrize(
    ("cu_seqlens", "options", "error", "words"),
    [
        ([0, 6], {}, TypeError, ["int32 tensor", "list"]),
        (torch.tensor([0, 6]), {}, TypeError, ["torch.int64", "torch.int32", ".to("]),
        (torch.tensor(6, dtype=torch.int32), {}, ValueError, ["shape ()", "(nseq + 1,)"]),
        (torch.zeros(0, dtype=torch.int32), {}, ValueError, ["shape (0,)", "(nseq + 1,)"]),
        (torch.zeros(1, 2, dtype=torch.int32), {}, ValueError, ["shape (1, 2)", "(nseq + 1,)"]),
        (packed([6]).to("meta"), {}, ValueError, ["on meta", "cpu", "move it"]),
        (packed([6]), {"batch": 2}, ValueError, ["batch=2", "batch 1", "concatenate along time"]),
        (packed([5]), {}, ValueError, ["0 to 5", "seqlen=6"]),
        (torch.tensor([0, 4, 3, 6], dtype=torch.int32), {}, ValueError, ["cu_seqlens[1]=4", "cu_seqlens[2]=3", "sort"]),
    ],
)
def test_messages(cu_seqlens: Any, options: dict[str, int], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error, match="op: ") as raised:
        check(cu_seqlens, **options)
    for word in words:
        assert word in str(raised.value)
