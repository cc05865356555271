"""Tables and plots of README and docs, made from the committed result files; never typed.

A page holds a pair of markers, `<!-- table: NAME -->` and `<!-- end table -->`; what stands between them is replaced.
`python -m benchmarks.report` writes, `--check` only says whether the pages are up to date (a test calls it).
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.ops import figure10

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *(ROOT / "docs" / name for name in ("benchmarks.md", "explanations/ssd-kernels.md")))
IMAGES = ROOT / "docs" / "images"
MARKER = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)

Record = dict[str, Any]


def load(job: str) -> list[Record]:
    """All records of a job, of every device."""
    return [entry for path in sorted(RESULTS.glob(f"{job}-*.json")) for entry in json.loads(path.read_text("utf-8"))]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join([" --- "] + [" ---: "] * (len(header) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def _find(records: list[Record], **keys: str) -> Record:
    matches = [r for r in records if all(r.get(key) == value for key, value in keys.items())]
    if len(matches) != 1:
        raise ValueError(f"{len(matches)} records match {keys}; run the job again with --save.")
    return matches[0]


def _origin(records: list[Record]) -> str:
    """Where records come from; several commits, where a file has those of several runs."""
    first, commits = records[0], list(dict.fromkeys(r["commit"] for r in records))
    plural = "s" if len(commits) > 1 else ""
    return f"\n*{first['device']}, torch {first['torch']}, {first['date']}, commit{plural} {', '.join(commits)}.*\n"


LM_ROWS = (
    ("130m 1x512", "prefill", "prefill, 512 tokens"),
    ("130m 1x2048", "prefill", "prefill, 2048 tokens"),
    ("130m 1x512", "fwdbwd", "forward + backward, 512 tokens"),
    ("130m 1", "decode", "decoding, a token"),
)


def lm_cpu() -> str:
    """A 130M model on the CPU against transformers."""
    records = load("lm_cpu")
    rows = []
    for shape, pass_, words in LM_ROWS:
        cells = [words]
        for impl in ("transformers fp32", "dualscan fp32", "transformers bf16", "dualscan bf16"):
            r = _find(records, shape=shape, impl=impl, **{"pass": pass_})
            times = "" if impl == "transformers fp32" else f" ({r['ratio']:.1f}x)"
            cells.append(f"{r['call_ms']:.0f} ms{times}" if r["call_ms"] >= 100 else f"{r['call_ms']:.1f} ms{times}")
        rows.append(cells)
    for shape, pass_, words in LM_ROWS[1:3]:
        cells = [f"peak memory, {words.split(',')[0]}"]
        for impl in ("transformers fp32", "dualscan fp32", "transformers bf16", "dualscan bf16"):
            cells.append(f"{_find(records, shape=shape, impl=impl, **{'pass': pass_})['peak_mib']:.0f} MiB")
        rows.append(cells)
    cells = ["error of the logits (float64 oracle)"]
    for impl in ("transformers fp32", "dualscan fp32", "transformers bf16", "dualscan bf16"):
        cells.append(f"{_find(records, shape='130m 1x512', impl=impl, **{'pass': 'prefill'})['error']:.1e}")
    rows.append(cells)
    header = ["", "transformers fp32", "dualscan fp32", "transformers bf16", "dualscan bf16"]
    return markdown(header, rows) + _origin(records)


def lm_cpu_lengths() -> str:
    """Prefill time against the prompt's length."""
    records = [r for r in load("lm_cpu") if r["pass"] == "prefill last"]
    rows = []
    for shape in dict.fromkeys(r["shape"] for r in records):
        fp32, bf16 = (_find(records, shape=shape, impl=f"dualscan {kind}") for kind in ("fp32", "bf16"))
        length = shape.split("x")[1]
        rows.append([length, *(f"{r['call_ms'] / 1e3:.2f} s, {r['tokens_per_s']:.0f} tokens/s" for r in (fp32, bf16))])
    return markdown(["prompt tokens", "fp32", "bf16"], rows) + _origin(records)


PASSES = {"fwd": "forward", "fwdbwd": "forward + backward", "step": "one token"}


def _number(record: Record | None, key: str, form: str = "{:.3g}") -> str:
    """A value as text; empty where it was not measured."""
    return "" if record is None or record.get(key) is None else form.format(record[key])


def _devices(job: str, table: Callable[[list[Record]], str]) -> str:
    """One table a device, the newest first."""
    records = load(job)
    names = sorted(
        {r["device"] for r in records}, key=lambda name: max(r["date"] for r in records if r["device"] == name)
    )
    return "\n".join(table([r for r in records if r["device"] == name]) for name in reversed(names))


def _beside(records: list[Record], rival: str) -> list[tuple[str, Record, Record | None]]:
    """What was measured, in words, with this library's record and the rival's."""
    pairs = []
    for mine in records:
        if mine["impl"] == "dualscan" and mine["pass"] in PASSES:
            same = [r for r in records if (r["shape"], r["pass"]) == (mine["shape"], mine["pass"])]
            theirs = next((r for r in same if r["impl"] == rival), None)
            pairs.append((f"{mine['shape']}, {PASSES[mine['pass']]}", mine, theirs))
    return pairs


def ssd(records: list[Record]) -> str:
    """SSD on a GPU beside its rivals: kernel and call times, memory, and the least exact gradient.

    Ratios stand where the operator's tests passed on the device in the same run.
    """
    tested = any("ratio" in r and r["impl"] == "dualscan" for r in records)
    rows = []
    for words, mine, theirs in _beside(records, "mamba_ssm"):
        pair = (mine, theirs)
        times = [_number(r, "kernel_ms", "{:.4g} ms") for r in pair]
        calls = [_number(r, "call_ms", "{:.3g} ms") for r in pair]
        ratios = [_number(mine, key, "{:.2f}x") for key in ("ratio", "call_ratio")] if tested else []
        memory = [_number(r, "peak_mib", "{:.0f} MiB") for r in pair]
        wrong = ["" if r is None or "error" not in r else f"{r['error']['dA']:.1e}" for r in pair]
        rows.append([words, *times, *calls, *ratios, _times(mine), _slashed(memory), _slashed(wrong)])
    for r in records:
        if r["impl"] not in ("dualscan", "mamba_ssm") and r["pass"] in PASSES:
            words = f"{r['impl']}, {r['shape']}, {PASSES[r['pass']]}"
            rows.append([words, "", f"{r['kernel_ms']:.4g} ms", *[""] * (5 + 2 * tested)])
    header = ["", "kernels", "mamba_ssm's", "call", "mamba_ssm's", *["ratio", "ratio of calls"][: 2 * tested]]
    header += ["of the bytes' time", "peak memory", "error of dA"]
    first = {r["pass"]: r["first_call_s"] for r in records if "first_call_s" in r}
    note = "".join(f"First call, {name.removesuffix(' first call')}: {s:.1f} s. " for name, s in first.items())
    for r in records:
        if r["pass"] == "tests":
            note += f"Tests on the device in this run: {r.get('passed', 0)} passed, {r.get('failed', 0)} failed."
    return markdown(header, rows) + (f"\n{note.strip()}\n" if note else "") + _origin(records)


def ssd_short() -> str:
    """One shape of SSD, on the device of the last run, beside mamba_ssm and attention of its width."""
    records = load("ssd")
    newest = max(records, key=lambda r: r["date"])["device"]
    impls = ("dualscan", "mamba_ssm", "sdpa-cudnn", "sdpa-flash")
    records = [r for r in records if r["device"] == newest and r["impl"] in impls]
    rows = []
    for pass_ in ("fwd", "fwdbwd"):
        found = {r["impl"]: r for r in records if (r["shape"], r["pass"]) == ("2.7b 8x2048", pass_)}
        rows.append([PASSES[pass_], *(_number(found.get(impl), "kernel_ms", "{:.3g} ms") for impl in impls)])
    header = ["", "dualscan", "mamba_ssm", "attention, cuDNN", "attention, FlashAttention-2"]
    return markdown(header, rows) + _origin(records)


def ssd_launches() -> str:
    """Every launch of SSD's passes by itself, on the device of the last run, beside the passes in CUDA graphs."""
    records = load("ssd")
    newest = max((r for r in records if "launch" in r["pass"]), key=lambda r: r["date"])["device"]
    records = [r for r in records if r["device"] == newest]
    own = [r for r in records if "launch" in r["pass"]]
    shapes = list(dict.fromkeys(r["shape"] for r in own))
    rows = []
    for pass_, words in (("fwd", "forward"), ("fwdbwd", "forward + backward")):
        for label in dict.fromkeys(r["impl"] for r in own if r["pass"] == f"{pass_} launch"):
            found = {r["shape"]: r for r in own if (r["pass"], r["impl"]) == (f"{pass_} launch", label)}
            rows.append([f"{words}: {label}", *(_number(found.get(shape), "kernel_ms", "{:.3f}") for shape in shapes)])
        whole = {r["shape"]: r for r in records if (r["pass"], r["impl"]) == (pass_, "dualscan")}
        rows.append([f"**{words}**", *(_number(whole.get(shape), "kernel_ms", "**{:.3f}**") for shape in shapes)])
    return markdown(["ms", *shapes], rows) + _origin(records)


def _times(r: Record) -> str:
    """How many times the floor of its bytes a kernel takes."""
    return f"{r['kernel_ms'] / r['floor_ms']:.2f}" if "floor_ms" in r else ""


def _slashed(cells: list[str]) -> str:
    """Ours / theirs."""
    return " / ".join(cell for cell in cells if cell)


def mamba2_block(records: list[Record]) -> str:
    """The whole Mamba-2 layer beside mamba_ssm's, where that was there."""
    rows = []
    for words, mine, theirs in _beside(records, "mamba_ssm"):
        alone = next(
            r
            for r in records
            if r["impl"] == "projections alone" and r["shape"] == mine["shape"] and r["pass"] == mine["pass"]
        )
        times = [_number(r, "kernel_ms", "{:.4g} ms") for r in (mine, theirs, alone)]
        calls = [_number(r, "call_ms", "{:.4g} ms") for r in (mine, theirs)]
        ratios = [_number(mine, key, "{:.2f}x") for key in ("ratio", "call_ratio")]
        memory = _slashed([_number(r, "peak_mib", "{:.0f} MiB") for r in (mine, theirs)])
        rows.append([words, *times, ratios[0], *calls, ratios[1], memory])
    header = ["", "kernels", "mamba_ssm", "projections alone", "ratio", "call", "mamba_ssm", "ratio", "peak memory"]
    return markdown(header, rows) + _origin(records)


def train_step() -> str:
    """A whole training step beside mamba_ssm's."""
    records = load("train_step")
    rows = [
        [
            r["shape"] + ("" if r.get("in_turns", True) else ", one model after the other"),
            r["impl"],
            _number(r, "call_ms", "{:.1f} ms"),
            _number(r, "tokens_per_s", "{:,.0f}"),
            _number(r, "mfu", "{:.1%}"),
            _number(r, "ratio", "{:.2f}x"),
            _number(r, "peak_mib", "{:,.0f} MiB"),
        ]
        for r in records
    ]
    header = ["", "", "step", "tokens/s", "MFU", "to mamba_ssm", "peak memory"]
    return markdown(header, rows) + _origin(records)


def generate() -> str:
    """Generation on a GPU beside transformers."""
    records = load("generate")
    rows = []
    for r in records:
        times = [_number(r, key, "{:.1f} ms") for key in ("call_ms", "prefill_ms", "step_ms")]
        rows.append(
            [r["shape"], r["impl"], *times, _number(r, "ratio", "{:.1f}x"), _number(r, "peak_mib", "{:,.0f} MiB")]
        )
    header = ["", "", "whole call", "prompt", "a token after it", "to transformers", "memory beyond the weights"]
    return markdown(header, rows) + _origin(records)


def in_transformers() -> str:
    """transformers' own model on this package's operators."""
    records = load("in_transformers")
    rows = []
    for shape, pass_, words in (*LM_ROWS[:2], LM_ROWS[3]):
        found = [r for r in records if (r["shape"], r["pass"]) == (shape, pass_)]
        rows.append([words, *(f"{r['call_ms']:.4g} ms ({r['ratio']:.2f}x)" for r in found)])
    return markdown(["", *dict.fromkeys(r["impl"] for r in records)], rows) + _origin(records)


def block_operator(job: str) -> str:
    """An operator of the block on a GPU beside its rivals: kernel time against the bytes or FLOPs at the ceiling."""
    records = load(job)
    impls = list(dict.fromkeys(r["impl"] for r in records))
    rows = []
    for shape, pass_ in dict.fromkeys((r["shape"], r["pass"]) for r in records):
        cells = [f"{shape}, {PASSES[pass_]}"]
        for impl in impls:
            found = [r for r in records if (r["shape"], r["pass"], r["impl"]) == (shape, pass_, impl)]
            cells.append(f"{found[0]['kernel_ms']:.3g} ms, {found[0]['peak_mib']:.0f} MiB" if found else "")
        mine = _find(records, shape=shape, impl="dualscan", **{"pass": pass_})
        rows.append([*cells, f"{100 * mine['share']:.0f} %", f"{max(mine['error'].values()):.1e}"])
    return markdown(["", *impls, "of the ceiling", "largest error"], rows) + _origin(records)


def selective_scan() -> str:
    """Mamba's scan on the CPU beside transformers' and SSD of the same width."""
    records = [r for r in load("selective_scan") if r["device"].startswith("cpu")]
    impls = list(dict.fromkeys(r["impl"] for r in records))
    rows = []
    for shape, pass_ in dict.fromkeys((r["shape"], r["pass"]) for r in records):
        found = {r["impl"]: r["call_ms"] for r in records if (r["shape"], r["pass"]) == (shape, pass_)}
        rows.append(
            [f"{shape}, {PASSES[pass_]}", *(f"{found[impl]:.3g} ms" if impl in found else "" for impl in impls)]
        )
    return markdown(["", *impls], rows) + _origin(records)


def selective_scan_gpu() -> str:
    """Mamba's scan on a GPU beside mamba_ssm's CUDA kernel and SSD of the same width."""
    records = [r for r in load("selective_scan") if not r["device"].startswith("cpu")]
    impls = list(dict.fromkeys(r["impl"] for r in records))
    rows = []
    for shape, pass_ in dict.fromkeys((r["shape"], r["pass"]) for r in records):
        found = {r["impl"]: r for r in records if (r["shape"], r["pass"]) == (shape, pass_)}
        cells = [
            f"{found[impl]['kernel_ms']:.3g} ms, {found[impl]['peak_mib']:.0f} MiB" if impl in found else ""
            for impl in impls
        ]
        mine = found["dualscan"]
        ratio = f"{mine['ratio']:.2f}x" if "ratio" in mine else ""
        rows.append([f"{shape}, {PASSES[pass_]}", *cells, ratio, f"{max(mine['error'].values()):.1e}"])
    return markdown(["", *impls, "to mamba_ssm", "largest error"], rows) + _origin(records)


def sma() -> str:
    """Both orders of structured masked attention against length, and the crossovers."""
    records = load("sma")
    lengths = sorted({int(r["shape"].split()[-1]) for r in records})
    columns = {
        "Toeplitz mask x 64 columns": ("toeplitz", "mask"),
        "Fourier mask x 64 columns": ("fourier", "mask"),
        "attention, Toeplitz, N = P = 16": ("toeplitz 16", "fwd"),
        "attention, Toeplitz, N = P = 64": ("toeplitz 64", "fwd"),
        "attention, cosine, N = P = 64": ("cosine 64", "fwd"),
    }
    rows, first = [], {}
    for length in lengths:
        cells = [str(length)]
        for words, (name, pass_) in columns.items():
            keys = {"shape": f"{name} {length}", "pass": pass_}
            linear, quadratic = (_find(records, impl=impl, **keys)["call_ms"] for impl in ("linear", "quadratic"))
            cells.append(f"{linear:.3g} / {quadratic:.3g} ms")
            if linear < quadratic:
                first.setdefault(words, length)
            else:
                first.pop(words, None)
        both = {"shape": f"130m {length}", "pass": "operator"}
        cells.append(f"{_find(records, impl='sma', **both)['ratio']:.2f}")
        rows.append(cells)
    crossovers = [f"{words} from T = {first[words]}" if words in first else f"{words} not yet" for words in columns]
    text = f"\nThe linear order is the faster one: {'; '.join(crossovers)}.\n"
    return markdown(["T", *columns, "1-SS: speed to `linear_attention`"], rows) + text + _origin(records)


TABLES: dict[str, Callable[[], str]] = {
    "lm_cpu": lm_cpu,
    "lm_cpu_lengths": lm_cpu_lengths,
    "ssd": partial(_devices, "ssd", ssd),
    "ssd_short": ssd_short,
    "ssd_launches": ssd_launches,
    "mamba2_block": partial(_devices, "mamba2_block", mamba2_block),
    "train_step": train_step,
    "generate": generate,
    "sma": sma,
    "selective_scan": selective_scan,
    "selective_scan_gpu": selective_scan_gpu,
    "in_transformers": in_transformers,
    **{job: partial(block_operator, job) for job in ("conv1d", "norm", "loss")},
}


def fill(text: str) -> str:
    """A page with its tables made anew.

    Raises:
        ValueError: a marker that names no table.
    """

    def replace(match: re.Match[str]) -> str:
        name = match.group(2)
        if name not in TABLES:
            raise ValueError(f"no table is called {name!r}; the tables are {', '.join(TABLES)}.")
        return match.group(1) + TABLES[name]() + match.group(3)

    return MARKER.sub(replace, text)


def stale_pages() -> list[Path]:
    """Pages whose tables differ from the result files."""
    return [page for page in PAGES if page.exists() and fill(page.read_text("utf-8")) != page.read_text("utf-8")]


def plot_lengths(path: Path) -> None:
    """Prefill time against length, beside a straight line through the origin."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [r for r in load("lm_cpu") if r["pass"] == "prefill last"]
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for kind, colour in (("fp32", "#3b6fb6"), ("bf16", "#d1603d")):
        mine = [r for r in records if r["impl"] == f"dualscan {kind}"]
        lengths = [int(r["shape"].split("x")[1]) for r in mine]
        seconds = [r["call_ms"] / 1e3 for r in mine]
        axes.loglog(lengths, seconds, "o-", color=colour, label=kind, base=2)
        slope = seconds[-1] / lengths[-1]
        axes.loglog(lengths, [slope * n for n in lengths], ":", color=colour, alpha=0.6, base=2)
    axes.set_xlabel("prompt length (tokens)")
    axes.set_ylabel("prefill time (s)")
    axes.set_title("Mamba-2 130M prefill on two CPU cores; dotted: exactly linear")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Writes the pages and plots, or checks the pages."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    args = parser.parse_args(argv)
    stale = stale_pages()
    if args.check:
        for page in stale:
            print(f"{page.relative_to(ROOT)} is out of date; run python -m benchmarks.report", file=sys.stderr)
        return 1 if stale else 0
    for page in stale:
        page.write_text(fill(page.read_text("utf-8")), encoding="utf-8")
        print("wrote", page.relative_to(ROOT))
    plot_lengths(IMAGES / "prefill.png")
    if records := load(figure10.JOB):
        figure10.plot(records, IMAGES / "figure10.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
