"""Metrics files survive crashes and resumption; the curve is a picture of them."""

import pytest

from dualscan.train import plot
from dualscan.train.metrics import MetricsLog, read


def test_records_are_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(1, loss=2.5, note="a")
        assert read(path) == [{"step": 1, "loss": 2.5, "note": "a"}]
        log.write(2, loss=0.1 + 0.2)
    assert read(path)[1]["loss"] == 0.1 + 0.2


def test_resuming_drops_later_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(1, 6):
            log.write(step, loss=float(step))
    with MetricsLog(path, after_step=3) as log:
        log.write(4, loss=40.0)
    assert [(r["step"], r["loss"]) for r in read(path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    with MetricsLog(path):
        pass
    assert read(path) == []


def test_a_cut_last_line_is_left_out_and_a_broken_one_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo', encoding="utf-8")
    assert read(path) == [{"step": 1}]
    with MetricsLog(path, after_step=9) as log:
        log.write(2)
    assert read(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1\n{"step": 2}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is not JSON"):
        read(path)


def records(n):
    train = [{"step": s, "tokens": 10 * s, "seconds": 0.5 * s, "train_bpb": 8.0 / s} for s in range(1, n + 1)]
    return [*train, {"step": n, "tokens": 10 * n, "validation_bpb": 8.0 / n}]


@pytest.mark.parametrize("n", [1, 2, 60])
def test_the_curve_is_drawn(tmp_path, n):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    plot.loss_curve(records(n), tmp_path / "loss.png", title="a run")
    pixels = imread(tmp_path / "loss.png")
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 900
    blue = (pixels[..., 2] > 0.7) & (pixels[..., 0] < 0.4)
    assert blue.sum() > (100 if n > 1 else 0), "the training curve is not there"
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no training record"):
        plot.loss_curve([], tmp_path / "loss.png", title="")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'dualscan\[plot\]'"):
        plot.loss_curve(records(2), tmp_path / "loss.png", title="")
