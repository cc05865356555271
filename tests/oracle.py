"""The one tolerance rule: error against the float64 recurrence, compared with the same-dtype portable form.

`err(candidate) <= factor * err(yardstick) + floor` and `err(candidate) <= cap`, with err the relative RMS of the
difference, and a max-abs guard against single wild elements. No test carries a literal of its own; loosening a cap is
its own commit with the reason.
"""

import torch
from torch import Tensor

# Largest relative RMS error that any implementation may show in a dtype: (values, gradients).
CAPS = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (1.5e-3, 1e-2),
    torch.bfloat16: (1e-2, 1e-2),
}
FLOORS = {torch.float64: 1e-14, torch.float32: 2e-7, torch.float16: 2e-4, torch.bfloat16: 2e-3}
# A single element may be this many times the RMS of the whole error away from typical before it counts as wild.
MAX_ABS_FACTOR = 50.0


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative RMS error; 0 for two empty tensors, inf when anything is not finite where the oracle is."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    if not torch.isfinite(actual).all():
        return float("inf")
    scale = expected.square().mean().sqrt()
    error = (actual - expected).square().mean().sqrt()
    return (error / scale).item() if scale > 0 else error.item()


def assert_close(
    name: str,
    actual: Tensor,
    expected: Tensor,
    *,
    dtype: torch.dtype,
    gradient: bool = False,
    yardstick: Tensor | None = None,
) -> None:
    """Asserts that `actual` is as close to the float64 `expected` as its dtype allows.

    Args:
        name: what is compared, for the message.
        actual: the candidate's result.
        expected: the float64 oracle's result on the same rounded inputs.
        dtype: the dtype that the candidate computed in; it picks the row of the table.
        gradient: use the gradient column and factor.
        yardstick: the portable form's result in the same dtype; when given, the candidate may be at most 2x (gradients
            3x) worse.
    """
    error = relative_error(actual, expected)
    limit = CAPS[dtype][gradient]
    if yardstick is not None:
        limit = min(limit, (3 if gradient else 2) * relative_error(yardstick, expected) + FLOORS[dtype])
    assert error <= limit, f"{name}: relative RMS error {error:.3e} exceeds {limit:.3e} ({dtype})"
    if expected.numel():
        difference = (actual.detach().double() - expected.detach().double()).abs().max().item()
        scale = expected.detach().double().square().mean().sqrt().item()
        guard = MAX_ABS_FACTOR * CAPS[dtype][gradient] * max(scale, expected.detach().abs().max().item())
        assert difference <= guard or scale == 0, (
            f"{name}: max abs error {difference:.3e} exceeds {guard:.3e} ({dtype})"
        )
