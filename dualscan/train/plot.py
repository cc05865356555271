"""The loss curve as a picture, from the metrics file. Only here is matplotlib imported, and only to draw."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from dualscan.train.metrics import Record

MISSING = "no loss curve: matplotlib is not installed (pip install 'dualscan[plot]')"

_INK, _MUTED, _TRAIN, _VALIDATION = "#1f2430", "#6b7280", "#2a6fdb", "#d1495b"


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def smooth(values: Sequence[float] | np.ndarray, span: int) -> np.ndarray:
    """Centred moving average whose window grows from 1 at the start, where the curve is steep, to `2 * span + 1`.

    Example:
        >>> smooth([9.0, 5.0, 5.0, 2.0, 5.0], span=1).tolist()
        [9.0, 5.0, 5.0, 4.0, 3.5]
    """
    halves = [min(span, index // 3) for index in range(len(values))]
    return np.array([np.mean(values[i - half : i + half + 1]) for i, half in enumerate(halves)])


def loss_curve(records: Sequence[Record], path: Path, *, title: str) -> None:
    """Draws training and validation loss in bits per byte over the tokens seen, with the training time on top.

    Args:
        records: from the metrics file; training records carry `tokens`, `seconds` and `train_bpb`, validation ones
            `tokens` and `validation_bpb`.
        path: the PNG file; replaced when the picture is complete.
        title: printed above the curve.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no training record.
    """
    if not available():
        raise ImportError(MISSING)
    train = [record for record in records if "train_bpb" in record]
    validation = [record for record in records if "validation_bpb" in record]
    if not train:
        raise ValueError("no training record to draw; the run has not finished its first logged step.")

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    tokens = np.array([record["tokens"] for record in train], dtype=float)
    minutes = np.array([record["seconds"] for record in train]) / 60.0
    bpb = np.array([record["train_bpb"] for record in train])

    figure = Figure(figsize=(8.0, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(tokens, bpb, color=_TRAIN, alpha=0.25, linewidth=0.8, label="train, each record")
    axes.plot(tokens, smooth(bpb, max(2, len(bpb) // 40)), color=_TRAIN, linewidth=1.8, label="train, smoothed")
    if validation:
        x = [record["tokens"] for record in validation]
        y = [record["validation_bpb"] for record in validation]
        axes.plot(x, y, color=_VALIDATION, linewidth=1.4, marker="o", markersize=4, label="validation")
        axes.annotate(
            f"{y[-1]:.3f}",
            (x[-1], y[-1]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color=_VALIDATION,
            fontweight="bold",
        )

    # The first steps fall from log2(vocab) within a few records; the rest of the curve is what the reader looks at.
    settled = [*bpb[len(bpb) // 20 :], *(record["validation_bpb"] for record in validation)]
    low, high = min(settled), max(settled)
    axes.set_ylim(low - 0.08 * (high - low) - 1e-3, high + 0.08 * (high - low) + 1e-3)
    axes.set_xlim(0, max(tokens[-1], *(record["tokens"] for record in records)) * 1.03)
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("loss (bits per byte)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_MUTED, labelcolor=_INK)
    axes.legend(frameon=False, loc="upper right")
    axes.set_title(title, loc="left", color=_INK, fontsize=11, pad=12)

    if len(train) > 1 and minutes[-1] > 0:
        _add_time_axis(axes, tokens, minutes, MaxNLocator(7, steps=[1, 2, 5, 10]))
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def _add_time_axis(axes, tokens: np.ndarray, minutes: np.ndarray, locator) -> None:
    """A second axis on top: training time is a piecewise linear function of the tokens, continued at its mean rate."""
    rate = minutes[-1] / tokens[-1]
    knots_tokens = np.concatenate([[0.0], tokens, [2 * tokens[-1]]])
    knots_minutes = np.concatenate([[0.0], minutes, [minutes[-1] + rate * tokens[-1]]])
    top = axes.secondary_xaxis(
        "top",
        functions=(
            lambda x: np.interp(x, knots_tokens, knots_minutes),
            lambda t: np.interp(t, knots_minutes, knots_tokens),
        ),
    )
    top.set_xlabel("training time (minutes)", color=_MUTED, fontsize=9)
    top.xaxis.set_major_locator(locator)
    top.tick_params(colors=_MUTED, labelsize=9)
    top.spines["top"].set_color("#d1d5db")
