"""The jobs of the scans run where there is no GPU as far as they can, and the figure draws what they saved."""

import json
import subprocess

import pytest
import torch

from benchmarks import common
from benchmarks.ops import figure10, selective_scan
from tests.oracle import CAPS


@pytest.fixture(autouse=True)
def _results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)


def saved(job: str) -> list[dict]:
    return json.loads((common.RESULTS / f"{job}-cpu.json").read_text(encoding="utf-8"))


TINY = ["--device", "cpu", "--tokens", "128", "--channels", "128", "--save"]


@pytest.mark.slow
def test_figure10(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figure10, "LENGTH", 64)
    monkeypatch.setattr(figure10, "BUDGET", 0.0)
    assert figure10.main([*TINY, "--lengths", "32", "128", "--states", "16", "64"]) == 0
    records = saved("figure10")
    assert {r["shape"] for r in records} == {"N16 2x64", "N64 2x64", "N64 4x32", "N64 1x128"}
    assert {r["impl"] for r in records} == {"dualscan ssd", "dualscan selective_scan", "sdpa-flash"}
    assert {r["pass"] for r in records} == {"fwd", "fwdbwd"}
    for r in records:
        assert r["ns_per_token"] == pytest.approx(1e6 * r["call_ms"] / 128)
        if "error" in r:
            assert 0 < r["error"]["y"] < CAPS[torch.bfloat16][0]
    picture = tmp_path / "figure10.png"
    figure10.plot(records, picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_who_fails_is_left_out(monkeypatch, capsys):
    def broken(t):
        raise RuntimeError("out of memory, said somebody")

    monkeypatch.setattr(figure10.scan, "scans", lambda: {"dualscan": (dict, selective_scan.ours)})
    monkeypatch.setattr(figure10, "attention", lambda backend, t: broken(t))
    assert figure10.main([*TINY, "--lengths", "64", "--states"]) == 0
    assert {r["impl"] for r in saved("figure10")} == {"dualscan selective_scan"}
    assert "N64 2x64 fwd sdpa-flash: failed: out of memory" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert figure10.main([]) == 1
    assert "needs an NVIDIA GPU; --device cpu" in capsys.readouterr().out


def test_selective_scan_on_a_cpu(monkeypatch):
    monkeypatch.setattr(selective_scan, "transformers", selective_scan.ours)
    shapes = ["--shapes", "130m 1x128"]
    monkeypatch.setitem(selective_scan.SHAPES, "130m 1x128", (1, 80, 64, 16))
    assert selective_scan.main(["--device", "cpu", "--repeats", "1", "--save", *shapes]) == 0
    records = saved("selective_scan")
    assert len(records) == 8
    for r in records:
        assert r["impl"] == "ssd" or 0 < r["error"]["y"] < CAPS[torch.float32][0]


def test_the_heads_of_ssd_compute_the_same_where_they_can():
    """With one decay and step a head both are one operator."""
    t = selective_scan.inputs(2, 40, 128, 8)
    t["A"] = torch.full_like(t["A"], -0.7)
    t["dt"] = t["dt"][..., :: selective_scan.HEADDIM].repeat_interleave(selective_scan.HEADDIM, -1)
    torch.testing.assert_close(selective_scan.duality(selective_scan.heads(t)).flatten(2), selective_scan.ours(t))


def test_channels_first_is_what_the_rival_reads():
    t = selective_scan.channels_first(selective_scan.inputs(2, 40, 12, 8))
    assert t["x"].shape == (2, 12, 40)
    assert t["B"].shape == (2, 8, 40)
    assert t["A"].shape == (12, 8)
    assert all(t[name].is_contiguous() for name in t)


def test_the_floor_counts_bytes():
    assert selective_scan.floor_ms((1, 1000, 500, 16), "fwd", 1e9) == pytest.approx((4 * 1e6 + 2 * 32e3) / 1e6)
    assert selective_scan.floor_ms((1, 1000, 500, 16), "fwdbwd", 1e9) == pytest.approx((11 * 1e6 + 6 * 32e3) / 1e6)


@pytest.mark.parametrize(
    ("last", "code", "expected"),
    [
        ("3 passed, 1 skipped, 2 warnings in 1.0s", 0, {"tested": True, "passed": 3}),
        ("1 failed, 2 passed in 1.0s", 1, {"tested": False, "passed": 2, "failed": 1}),
        ("4 skipped in 1.0s", 0, {"tested": False}),
    ],
)
def test_ssd_records_its_tests(last: str, code: int, expected: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.ops import ssd

    run = subprocess.CompletedProcess([], code, f"...\n{last}\n", "")
    monkeypatch.setattr(ssd.subprocess, "run", lambda *_, **__: run)
    monkeypatch.setattr(ssd.common, "commit", lambda: "unknown")
    entry = ssd.run_tests()
    assert {key: entry[key] for key in ("tested", "passed", "failed") if key in entry} == expected
