"""The paper's duality on a trained model: recurrent, quadratic and chunked SSD give the same output."""

from typing import NamedTuple

import torch
from torch import Tensor

from dualscan.models.lm import MambaLM
from dualscan.nn.mamba2 import Mamba2
from dualscan.ops.conv1d import causal_conv1d
from dualscan.ops.ssd import ssd

FORMS = {
    "recurrent": "one token after the other, as in generation",
    "quadratic": "one masked seqlen x seqlen matrix, as in attention",
    "chunked": "blocks of the matrix joined by states, as in training",
}
# Relative RMS error up to which two forms agree: a few hundred roundings of the dtype.
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}


class Agreement(NamedTuple):
    """One form's largest relative RMS error over all layers, against the float64 recurrence.

    Attributes:
        form: value of `impl`.
        dtype: what it was computed in.
        error: relative RMS error of the output, or of the final state if that is larger.
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
    """Runs every Mamba-2 layer's SSD in all three forms on what reaches it from a text.

    Args:
        model: a trained model in float32.
        tokens: `(batch, seqlen)` int64.

    Returns:
        One entry for each form and dtype (float32, float64).
    """
    inputs: list[tuple[Mamba2, Tensor]] = []
    mixers = [module for module in model.modules() if isinstance(module, Mamba2)]
    hooks = [mixer.register_forward_pre_hook(lambda mixer, args: inputs.append((mixer, args[0]))) for mixer in mixers]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    worst: dict[tuple[str, torch.dtype], float] = {}
    for mixer, u in inputs:
        exact = _run(mixer, u, torch.float64, "recurrent")
        for dtype in LIMITS:
            for form in FORMS:
                outputs = _run(mixer, u, dtype, form)
                error = max(_relative_rms(a, b) for a, b in zip(outputs, exact, strict=True))
                worst[form, dtype] = max(error, worst.get((form, dtype), 0.0))
    return [Agreement(form, dtype, error) for (form, dtype), error in worst.items()]


def _run(mixer: Mamba2, u: Tensor, dtype: torch.dtype, form: str) -> tuple[Tensor, Tensor]:
    """Output and final state of a layer's SSD, on inputs that are computed in float32 and then widened."""
    bc_dim = mixer.ngroups * mixer.d_state
    xBC_dim = mixer.conv1d.in_channels
    _, xBC, dt = mixer.in_proj(u).split([mixer.d_inner, xBC_dim, mixer.nheads], dim=-1)
    xBC = causal_conv1d(xBC, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, activation="silu").y
    x, B, C = (part.to(dtype) for part in xBC.split([mixer.d_inner, bc_dim, bc_dim], dim=-1))
    A, D, dt_bias = (parameter.to(dtype) for parameter in (-mixer.A_log.exp(), mixer.D, mixer.dt_bias))
    return ssd(
        x.unflatten(-1, (mixer.nheads, mixer.headdim)),
        dt.to(dtype),
        A,
        B.unflatten(-1, (mixer.ngroups, mixer.d_state)),
        C.unflatten(-1, (mixer.ngroups, mixer.d_state)),
        D=D,
        dt_bias=dt_bias,
        dt_softplus=True,
        dt_limit=mixer.dt_limit,
        impl=form,
    )


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
