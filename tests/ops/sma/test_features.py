"""Every feature map against the kernel that it stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dualscan.ops.sma import features, rotation
from tests.oracle import assert_close

quick = settings(max_examples=25, deadline=None, derandomize=True)

sizes = st.integers(1, 9)


def pair(n: int, rows: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, n, dtype=torch.float64), torch.randn(rows, n, dtype=torch.float64)


KERNELS = {
    "identity": lambda q, k: q @ k.mT,
    "silu": lambda q, k: (q * q.sigmoid()) @ (k * k.sigmoid()).mT,
    "exp": lambda q, k: (q[:, None] + k[None]).exp().sum(-1),
    "relu": lambda q, k: (q.clamp(min=0)[:, None] * k.clamp(min=0)[None]).sum(-1),
    "elu_plus_one": lambda q, k: torch.where(q > 0, q + 1, q.exp()) @ torch.where(k > 0, k + 1, k.exp()).mT,
    "square": lambda q, k: (q @ k.mT) ** 2,
    "taylor": lambda q, k: 1 + q @ k.mT / q.shape[-1] ** 0.5 + (q @ k.mT) ** 2 / (2 * q.shape[-1]),
    "l2_norm": torch.nn.CosineSimilarity(dim=-1),
}


@quick
@given(st.sampled_from(sorted(KERNELS)), sizes)
def test_product_of_features_is_the_kernel(name: str, n: int) -> None:
    q, k = pair(n)
    feature = getattr(features, name)
    expected = KERNELS[name](q[:, None], k[None]) if name == "l2_norm" else KERNELS[name](q, k)
    assert_close(name, feature(q) @ feature(k).mT, expected, dtype=torch.float64)
    assert feature(q).shape[-1] == features.feature_size(name, n)


@quick
@given(st.integers(2, 9))
def test_norms(n: int) -> None:
    x, _ = pair(n)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close("layer norm", features.layer_norm(x), expected, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close("rms norm", features.rms_norm(x), expected, dtype=torch.float64)


@quick
@given(sizes, st.floats(1e-4, 1.0))
def test_cosformer_weighs_by_the_cosine_of_the_distance(n: int, rate: float) -> None:
    q, k = pair(n)
    place = torch.arange(7.0, dtype=torch.float64)
    mapped = [features.cosformer(x, rate * place[:, None]) for x in (q, k)]
    expected = (q.relu() @ k.relu().mT) * (rate * (place[:, None] - place)).cos()
    assert_close("cosformer", mapped[0] @ mapped[1].mT, expected, dtype=torch.float64)


@pytest.mark.parametrize(("name", "m"), [("rfa", 4000), ("performer", 20000)])
def test_random_features_have_the_kernel_as_their_mean(name: str, m: int) -> None:
    # The variance of positive features grows as exp(|q + k|²): short vectors, so that the test is a sharp one.
    q, k = (features.l2_norm(x) for x in pair(4))
    projection = features.random_projection(m, 4).double()
    feature = getattr(features, name)
    if name == "rfa":
        expected = (KERNELS["l2_norm"](q[:, None], k[None]) - 1).exp()
    else:
        expected = (q @ k.mT).exp()
    torch.testing.assert_close(feature(q, projection) @ feature(k, projection).mT, expected, rtol=0.1, atol=0.04)


def test_performer_features_are_positive() -> None:
    q, _ = pair(5)
    assert (features.performer(3 * q, features.random_projection(8, 5)) > 0).all()


def test_random_projection_is_orthogonal_in_blocks() -> None:
    projection = features.random_projection(10, 4).double()
    assert projection.shape == (10, 4)
    for block in projection.split(4):
        directions = block / block.norm(dim=-1, keepdim=True)
        assert_close("gram", directions @ directions.mT, torch.eye(len(block)).double(), dtype=torch.float32)


def test_random_projection_is_normal_and_repeatable() -> None:
    draw = [features.random_projection(40000, 3, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draw)
    assert abs(draw[0].mean().item()) < 0.02
    torch.testing.assert_close(draw[0].mT.cov(), torch.eye(3), atol=0.03, rtol=0)


@quick
@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 3))
def test_a_state_is_independent_of_where_counting_began(first: int, rest: int, pairs: int) -> None:
    rates = torch.rand(pairs, dtype=torch.float64)
    x = torch.randn(first + rest, 2 * pairs, dtype=torch.float64)

    def state(x: Tensor) -> Tensor:
        place = rotation.positions(len(x), None, x.device)
        summed = rotation.rotate(x, place[:, None] * rates).sum(0)
        return rotation.advance(summed.view(1, 1, 1, -1), rates, len(x), None)

    later = rotation.advance(state(x[:first]), rates, rest, None)
    assert_close("state", state(x[first:]) + later, state(x), dtype=torch.float64)


def test_positions_start_anew_in_every_packed_sequence() -> None:
    bounds = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert rotation.positions(5, bounds, bounds.device).tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("swsh", ["'swsh'", "silu", "joined by '+'"]),
        ("silu+talor", ["'talor'", "Did you mean 'taylor'?"]),
        ("", ["unknown feature map ''"]),
        ("cosformer+square", ["'cosformer+square'", "must be the last"]),
    ],
)
def test_unknown_names(name: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        features.feature_size(name, 4)
    for word in words:
        assert word in str(raised.value)
