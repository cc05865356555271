"""The pictures of explanations/duality.md, drawn from what the code computes: `python docs/_pictures.py`."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from torch import Tensor

from dualscan.semiseparable import (
    Cosine,
    LowRank,
    OneSemiseparable,
    SemiseparableMatrix,
    StructuredMatrix,
    Toeplitz,
    block_ranks,
    count,
    scan,
)
from dualscan.semiseparable.scans import ALGORITHMS

IMAGES = Path(__file__).resolve().parent / "images"
INK, MUTED, BLUE, RED, GREEN = "#1f2430", "#6b7280", "#2a6fdb", "#d1495b", "#2f9e6e"


def problem(length: int = 32, order: int = 4) -> tuple[OneSemiseparable, LowRank]:
    """A mask that forgets at two tokens, and scores of keys and queries that change slowly."""
    generator = torch.Generator().manual_seed(3)
    decay = 0.93 + 0.07 * torch.rand(length, generator=generator, dtype=torch.float64)
    decay[11], decay[22] = 0.35, 0.1

    def smooth() -> Tensor:
        noise = torch.randn(length, order, generator=generator, dtype=torch.float64)
        return OneSemiseparable(torch.full((length,), 0.6, dtype=torch.float64)) @ noise

    return OneSemiseparable(decay), LowRank(smooth(), smooth())


def duality() -> Figure:
    """The mask, the scores, and their elementwise product: the matrix of the recurrence."""
    figure = _figure(9.6, 3.4)
    panels = figure.subplots(1, 3)
    mask, scores = problem()
    titles = ("L: what is remembered", "C Bᵀ: who is alike", "L ∘ C Bᵀ: the matrix of the recurrence")
    for axes, matrix, title in zip(panels, (mask, scores, mask * scores), titles, strict=True):
        _show(axes, matrix.to_dense())
        axes.set_title(title, fontsize=10, color=INK)
    for axes, sign in zip(panels[1:], "∘=", strict=True):
        axes.text(-0.13, 0.5, sign, transform=axes.transAxes, ha="center", va="center", fontsize=20, color=INK)
    return figure


def blocks(chunk: int = 8) -> Figure:
    """The chunked algorithm as a drawing of the matrix, and the ranks that make it possible."""
    figure = _figure(9.6, 4.2)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1, 1.25]})
    mask, scores = problem()
    matrix = mask * scores
    dense, length = matrix.to_dense(), matrix.shape[-1]
    _show(left, dense)
    for i in range(0, length, chunk):
        for j in range(0, i + 1, chunk):
            block = matrix.block(slice(i, i + chunk), slice(j, j + chunk))
            color = BLUE if i == j else RED
            left.add_patch(Rectangle((j - 0.5, i - 0.5), chunk, chunk, fill=False, edgecolor=color, linewidth=1.8))
            if isinstance(block, LowRank):
                rank = torch.linalg.matrix_rank(block.to_dense()).item()
                label = {"ha": "center", "va": "center", "fontsize": 8, "color": RED}
                label["bbox"] = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
                left.text(j + chunk / 2 - 0.5, i + chunk / 2 - 0.5, f"rank {rank}", **label)
    left.set_title("chunks: blue whole, red through the state", fontsize=10, color=INK)
    full = torch.randn(dense.shape, dtype=dense.dtype, generator=torch.Generator().manual_seed(0)).tril()
    for values, color, name in ((full, MUTED, "any lower triangular matrix"), (dense, RED, "a recurrence, N = 4")):
        right.plot(block_ranks(values).tolist(), color=color, marker="o", markersize=3, label=name)
    right.set_xlabel("token t", color=INK)
    right.set_ylabel("rank of M[t:, :t+1]", color=INK)
    right.set_ylim(0)
    _finish(right)
    return figure


def costs() -> Figure:
    """Work and depth of the scans, and of three ways to multiply by one matrix; counted, nothing is computed."""
    figure = _figure(9.6, 3.9)
    left, right = figure.subplots(1, 2)
    tokens = 1024
    a, x = torch.empty(tokens, device="meta"), torch.empty(tokens, 1, device="meta")
    offsets = {"sequential": (6, 6), "fully_recurrent": (6, -12), "state_passing": (-8, 8), "dilated": (-8, 8)}
    for name in ALGORITHMS:
        cost = count(scan, a, x, algorithm=name)
        work, (dx, dy) = cost.flops / tokens, offsets.get(name, (6, 6))
        left.plot(work, cost.depth, "o", color=BLUE)
        left.annotate(name, (work, cost.depth), (dx, dy), textcoords="offset points", fontsize=8, color=INK,
                      ha="left" if dx > 0 else "right")  # fmt: skip
    left.set(xscale="log", yscale="log", xlim=(1.5, 60), ylim=(6, 3000))
    left.xaxis.set_major_locator(FixedLocator([2, 5, 10, 20, 50]))
    left.xaxis.set_major_formatter(ScalarFormatter())
    left.xaxis.set_minor_locator(NullLocator())
    left.set_xlabel("operations a token and channel", color=INK)
    left.set_ylabel("longest chain of operations", color=INK)
    left.set_title(f"six scans of {tokens} tokens", fontsize=10, color=INK)
    lengths = [64, 256, 1024, 2048]
    for mode, color in (("linear", GREEN), ("quadratic", RED), ("chunked", BLUE)):
        counted = [_mode_cost(mode, length, 64) for length in lengths]
        right.plot(lengths, [cost.flops for cost in counted], color=color, label=mode)
        right.plot(lengths, [cost.matmul_flops for cost in counted], color=color, linestyle=":")
    right.plot([], [], color=MUTED, linestyle=":", label="in matrix products")
    right.set(xscale="log", yscale="log")
    right.set_xlabel("tokens T", color=INK)
    right.set_title("operations of one head, N = P = 64", fontsize=10, color=INK)
    for axes in (left, right):
        _finish(axes)
    return figure


def _mode_cost(mode: str, length: int, size: int):
    matrix = SemiseparableMatrix.random(length, size, device=torch.device("meta"))
    return count(matrix.matmul, torch.empty(length, size, device="meta"), mode=mode)


def masks(length: int = 32) -> Figure:
    """Masks that multiply fast, and the state that each would need as a recurrence."""
    time = torch.arange(length, dtype=torch.float64)
    forget, _ = problem(length)
    gallery: dict[str, StructuredMatrix] = {
        "causal\nlinear attention": OneSemiseparable(torch.ones(length, dtype=torch.float64)),
        "decay\nRetNet": OneSemiseparable(torch.full((length,), 0.9, dtype=torch.float64)),
        "1-semiseparable\nSSD": forget,
        "window of 8\nToeplitz": Toeplitz((time < 8).double()),
        "power law\nToeplitz": Toeplitz((1 + time) ** -0.7),
        "cosine\nnot causal": Cosine(length, dtype=torch.float64),
    }
    figure = _figure(11.4, 2.9)
    for axes, (name, mask) in zip(figure.subplots(1, len(gallery)), gallery.items(), strict=True):
        _show(axes, mask.to_dense())
        axes.set_title(name, fontsize=9, color=INK)
        states = block_ranks(mask, tol=1e-3).max().item() if mask.is_causal else 0
        words = f"{states} states" if states > 1 else "1 state" if states else "no recurrence"
        axes.set_xlabel(words, fontsize=9, color=MUTED)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _show(axes: Axes, matrix: Tensor) -> None:
    largest = matrix.abs().max().item()
    axes.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
    axes.set_xticks([])
    axes.set_yticks([])


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.tick_params(colors=MUTED, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


PICTURES: dict[str, Callable[[], Figure]] = {"duality": duality, "blocks": blocks, "costs": costs, "masks": masks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures")
    out = parser.parse_args().out
    for name, draw in PICTURES.items():
        path = out / f"duality-{name}.png"
        partial = path.with_suffix(".partial")
        draw().savefig(partial, format="png", metadata={"Software": None})
        os.replace(partial, path)
        print(path)


if __name__ == "__main__":
    main()
