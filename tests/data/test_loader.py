"""The training loader against its specification, and the evaluation pass against the documents."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dualscan.data.loader import Batch, EvaluationBatch, Loader, evaluation_batches
from dualscan.data.packing import TokenStream, TokenView
from dualscan.data.shards import write_shards
from dualscan.data.sources import Document
from dualscan.data.tokenizer import ByteTokenizer
from dualscan.ops.varlen import validate_cu_seqlens
from tests.data.strategies import streams, texts

TOKENIZER = ByteTokenizer()
# Position p of this stream has the target p + 1 (the last one the end-of-document id 0): a window tells its start.
COUNTING = TokenStream.from_ids([range(1, 998)], eos_id=0)


class NotByteLevel(ByteTokenizer):
    """A tokenizer whose ids do not tell their bytes."""

    def byte_lengths(self) -> None:  # pyrefly: ignore[bad-override]
        return None


def take(loader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def boundaries(batch: Batch | EvaluationBatch) -> list[int] | None:
    """The packed boundaries, which must be a valid `cu_seqlens` of the batch."""
    if batch.cu_seqlens is None:
        return None
    rows, length = batch.tokens.shape
    validate_cu_seqlens(batch.cu_seqlens, batch=rows, seqlen=length, device=torch.device("cpu"), name="test")
    return batch.cu_seqlens.tolist()


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets) and boundaries(a) == boundaries(b)
        for a, b in zip(left, right, strict=True)
    )


@given(
    stream=streams(),
    batch_size=st.integers(1, 4),
    seqlen=st.integers(1, 8),
    packed=st.booleans(),
    done=st.integers(0, 20),
    seed=st.integers(0, 5),
)
def test_resumes_bitwise(stream, batch_size, seqlen, packed, done, seed):
    assume(len(stream) >= seqlen)
    options = {"batch_size": batch_size, "seqlen": seqlen, "packed": packed, "seed": seed}
    loader = Loader(stream, **options)
    take(loader, done)
    state = loader.state_dict()
    resumed = Loader(stream, **options)
    resumed.load_state_dict(state)
    assert resumed.epochs == loader.epochs
    assert same(take(loader, 12), take(resumed, 12))
    assert state != loader.state_dict() == resumed.state_dict()


@given(
    stream=streams(),
    batch_size=st.integers(1, 3),
    seqlen=st.integers(1, 8),
    world_size=st.integers(1, 4),
    packed=st.booleans(),
)
def test_ranks_share_the_global_batch(stream, batch_size, seqlen, world_size, packed):
    assume(len(stream) >= seqlen)
    whole = Loader(stream, batch_size=batch_size * world_size, seqlen=seqlen)
    ranks = [
        Loader(stream, batch_size=batch_size, seqlen=seqlen, packed=packed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for _ in range(5):
        expected = next(whole)
        parts = [next(loader) for loader in ranks]
        for field in ("tokens", "targets"):
            joined = torch.cat([getattr(part, field).reshape(batch_size, seqlen) for part in parts])
            assert torch.equal(joined, getattr(expected, field))
    assert len({str(loader.state_dict()) for loader in [whole, *ranks]}) == 1


def window_starts(loader: Loader, epochs: int) -> dict[int, list[int]]:
    """The start of each window of the first epochs, in order."""
    starts: dict[int, list[int]] = {}
    for batch in loader:
        epoch = loader.state_dict()["epoch"]
        if epoch == epochs:
            return starts
        starts.setdefault(epoch, []).append(int(batch.tokens[0, 0]))
    raise AssertionError("the loader ended")


@given(seqlen=st.integers(1, 998), seed=st.integers(0, 50))
def test_an_epoch_takes_every_window_behind_its_offset_once(seqlen, seed):
    assume(seqlen >= 8 or seed < 2)
    for starts in window_starts(Loader(COUNTING, batch_size=1, seqlen=seqlen, seed=seed), 3).values():
        offset = min(starts)
        assert offset < seqlen
        assert sorted(starts) == list(range(offset, 998 - seqlen + 1, seqlen))


def test_windows_are_the_stream():
    for batch in take(Loader(COUNTING, batch_size=3, seqlen=40), 50):
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert batch.cu_seqlens is None
        starts = batch.tokens[:, :1]
        assert torch.equal(batch.tokens, starts + torch.arange(40))
        assert torch.equal(batch.targets, (starts + torch.arange(1, 41)) % 998)


def test_epochs_differ_in_offset_and_order_and_seeds_too():
    starts = window_starts(Loader(COUNTING, batch_size=1, seqlen=50), 6)
    assert len({min(epoch) for epoch in starts.values()}) > 3
    assert all(epoch != sorted(epoch) for epoch in starts.values())
    orders = [tuple((start - min(epoch)) // 50 for start in epoch) for epoch in starts.values()]
    assert len(set(orders)) == 6
    assert window_starts(Loader(COUNTING, batch_size=1, seqlen=50, seed=1), 1)[0] != starts[0]
    assert window_starts(Loader(COUNTING, batch_size=1, seqlen=50), 6) == starts


def test_every_token_comes_up_over_a_few_epochs():
    seen = np.zeros(998, dtype=int)
    for epoch in window_starts(Loader(COUNTING, batch_size=1, seqlen=64), 200).values():
        for start in epoch:
            seen[start : start + 64] += 1
    # 14 or 15 windows of 64 of the 998 positions an epoch; the ends come up less often than the middle, but do.
    assert seen[64:-64].min() == seen.max() == 200
    assert seen.min() > 0


@given(stream=streams(), batch_size=st.integers(1, 4), seqlen=st.integers(1, 8), seed=st.integers(0, 3))
def test_packed_is_unpacked_with_boundaries(stream, batch_size, seqlen, seed):
    assume(len(stream) >= seqlen)
    options = {"batch_size": batch_size, "seqlen": seqlen, "seed": seed}
    for plain, packed in zip(
        take(Loader(stream, **options), 5), take(Loader(stream, packed=True, **options), 5), strict=True
    ):
        assert torch.equal(packed.tokens, plain.tokens.reshape(1, -1))
        assert torch.equal(packed.targets, plain.targets.reshape(1, -1))
        length = batch_size * seqlen
        # A boundary stands at each window and wherever the previous target closed a document, nowhere else.
        closed = (packed.targets[0, :-1] == stream.eos_id).nonzero().flatten() + 1
        assert boundaries(packed) == sorted({*range(0, length + 1, seqlen), *closed.tolist()})


def test_shards_views_and_memory_give_the_same_batches(tmp_path):
    documents = [Document(f"document {n} " * (n + 1), "d") for n in range(12)]
    memory = TokenStream.from_documents(documents, TOKENIZER)
    shards = write_shards(documents, TOKENIZER, tmp_path / "tokens", shard_tokens=77, progress=False)
    for packed in (False, True):
        sources = (memory, shards, TokenView(memory, 0, 12), TokenView(shards, 0, 12))
        batches = [take(Loader(source, batch_size=2, seqlen=50, packed=packed), 30) for source in sources]
        assert all(same(batches[0], other) for other in batches[1:])


@pytest.mark.parametrize("packed", [False, True])
@given(
    parts=st.lists(texts, min_size=1, max_size=6),
    batch_size=st.integers(1, 4),
    seqlen=st.integers(1, 30),
    world_size=st.integers(1, 3),
)
def test_evaluation_covers_every_token_and_byte_once(packed, parts, batch_size, seqlen, world_size):
    stream = TokenStream.from_documents([Document(text, "d") for text in parts], TOKENIZER)
    options = {"batch_size": batch_size, "seqlen": seqlen, "packed": packed, "world_size": world_size}
    for tokenizer in (TOKENIZER, NotByteLevel()):
        ranks = [list(evaluation_batches(stream, tokenizer, rank=rank, **options)) for rank in range(world_size)]
        batches = [batch for row in itertools.zip_longest(*ranks) for batch in row if batch is not None]
        targets = torch.cat([batch.targets.flatten() for batch in batches])
        inputs = torch.cat([batch.tokens.flatten() for batch in batches])
        kept = targets != -100
        assert targets[kept].tolist() == stream.tokens.tolist()
        assert inputs[kept].tolist() == [256, *stream.tokens.tolist()[:-1]]
        assert sum(batch.nbytes for batch in batches) == sum(len(text.encode()) for text in parts)
        for batch in batches:
            assert batch.nbytes == ((batch.targets >= 0) & (batch.targets < 256)).sum()
            assert (boundaries(batch) is not None) == packed


def test_evaluation_on_shards(tmp_path):
    documents = [Document(f"document {n} " * (n + 1), "d") for n in range(12)]
    memory = TokenStream.from_documents(documents, TOKENIZER)
    shards = write_shards(documents, TOKENIZER, tmp_path / "tokens", shard_tokens=77, progress=False)
    batches = [list(evaluation_batches(source, TOKENIZER, batch_size=3, seqlen=40)) for source in (memory, shards)]
    assert [batch.nbytes for batch in batches[0]] == [batch.nbytes for batch in batches[1]]
    assert same([Batch(*batch[:3]) for batch in batches[0]], [Batch(*batch[:3]) for batch in batches[1]])


def test_resuming_with_another_batch_size_goes_on_in_order():
    loader = Loader(COUNTING, batch_size=4, seqlen=30)
    take(loader, 3)
    resumed = Loader(COUNTING, batch_size=2, seqlen=30)
    resumed.load_state_dict(loader.state_dict())
    halves = take(resumed, 8)
    for whole in take(loader, 4):
        assert torch.equal(whole.tokens, torch.cat([halves.pop(0).tokens, halves.pop(0).tokens]))


def test_epochs_counts_passes():
    loader = Loader(COUNTING, batch_size=1, seqlen=499)
    windows = [len(starts) for starts in window_starts(Loader(COUNTING, batch_size=1, seqlen=499), 2).values()]
    assert loader.epochs == 0
    take(loader, sum(windows))
    assert loader.epochs == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size=0; it must be at least 1"),
        ({"seqlen": 0}, ValueError, "seqlen=0"),
        ({"world_size": 0}, ValueError, "world_size=0"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an integer, got 2.0"),
        ({"seqlen": True}, TypeError, "seqlen must be an integer, got True"),
        ({"rank": 2, "world_size": 2}, ValueError, r"rank=2 is outside \[0, 2\)"),
        ({"rank": -1}, ValueError, "rank=-1"),
        ({"batch_size": 2**21, "seqlen": 2**10}, ValueError, r"passes 2\^31"),
    ],
)
def test_sizes_refused(change, error, message):
    options: dict[str, Any] = {"batch_size": 2, "seqlen": 10, **change}
    with pytest.raises(error, match=message):
        Loader(COUNTING, **options)
    with pytest.raises(error, match=message):
        evaluation_batches(COUNTING, TOKENIZER, **options)


def test_seed_and_short_text_refused():
    with pytest.raises(ValueError, match="seed=-1 must be an integer"):
        Loader(COUNTING, batch_size=1, seqlen=2, seed=-1)
    with pytest.raises(ValueError, match="the text has 998 tokens, fewer than seqlen=999; use a shorter seqlen"):
        Loader(COUNTING, batch_size=1, seqlen=999)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "the saved loader has seed=7, not 0"),
        ({"seqlen": 7}, "the saved loader has seqlen=7, not 10"),
        ({"ntokens": 7}, "the saved loader has ntokens=7, not 998; resume with the same data"),
        ({"position": 999}, r"position=999 is outside \[0, 99\]"),
        ({"extra": 1}, "a loader's state has the keys epoch, position"),
    ],
)
def test_foreign_states_refused(change, message):
    loader = Loader(COUNTING, batch_size=2, seqlen=10)
    before = loader.state_dict()
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict({**before, **change})
    with pytest.raises(ValueError, match="got none"):
        loader.load_state_dict({})
