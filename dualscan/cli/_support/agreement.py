"""The paper's duality on a trained model: recurrent, quadratic and chunked SSD give the same output."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from dualscan.models.lm import MambaLM
from dualscan.nn.mamba2 import Mamba2, Mamba2State

FORMS = {
    "recurrent": "one token after the other, as in generation",
    "quadratic": "one masked seqlen x seqlen matrix, as in attention",
    "chunked": "blocks of the matrix joined by states, as in training",
}
# Relative RMS error up to which two forms agree: a few hundred roundings of the dtype.
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}


class Agreement(NamedTuple):
    """One form's relative RMS error against the float64 recurrence.

    Attributes:
        form: value of `impl`.
        dtype: what the model was computed in.
        error: the largest of the logits' and of every layer's final state.
    """

    form: str
    dtype: torch.dtype
    error: float

    @property
    def agrees(self) -> bool:
        """Whether the error is rounding."""
        return self.error <= LIMITS[self.dtype]


@torch.inference_mode()
def compare_forms(model: MambaLM, tokens: Tensor) -> list[Agreement]:
    """Runs a text through the whole model in all three forms.

    Args:
        model: a trained model in float32; it is left as it was.
        tokens: `(batch, seqlen)` int64.

    Returns:
        One entry for each form and dtype (float32, float64).
    """
    exact = _run(model, tokens, torch.float64, "recurrent")
    agreements = []
    for dtype in LIMITS:
        for form in FORMS:
            outputs = _run(model, tokens, dtype, form)
            error = max(_relative_rms(a, b) for a, b in zip(outputs, exact, strict=True))
            agreements.append(Agreement(form, dtype, error))
    return agreements


def _run(model: MambaLM, tokens: Tensor, dtype: torch.dtype, form: str) -> list[Tensor]:
    """The logits and every Mamba-2 layer's final state."""
    model = copy.deepcopy(model).to(dtype)
    for module in model.modules():
        if isinstance(module, Mamba2):
            module.impl = form
    logits, state = model(tokens)
    return [logits, *(layer.ssm for layer in state if isinstance(layer, Mamba2State))]


def _relative_rms(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()


def table(agreements: list[Agreement]) -> str:
    """The errors as lines of text, a form each."""
    errors = {(entry.form, entry.dtype): entry.error for entry in agreements}
    lines = [f"{'form':<10} {'float32':>9} {'float64':>9}   computes"]
    for form, how in FORMS.items():
        exact = "reference" if form == "recurrent" else f"{errors[form, torch.float64]:.1e}"
        lines.append(f"{form:<10} {errors[form, torch.float32]:>9.1e} {exact:>9}   {how}")
    return "\n".join(lines)
