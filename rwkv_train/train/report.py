"""`train.py report RUN`: what a run has done so far, as one HTML page that needs nothing else, and its pictures."""

import base64
import html
import json
from dataclasses import dataclass
from pathlib import Path

from rwkv_train.checkpoints.run_checkpoint import run_checkpoints, verify
from rwkv_train.command_config import ReportConfig
from rwkv_train.files import read_lines, read_text, replace_file
from rwkv_train.train.runlog import duration, read_metrics

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{name}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
img {{ max-width: 100%; }} pre {{ background: #8881; padding: 1rem; overflow: auto; white-space: pre-wrap; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2rem .8rem .2rem 0; text-align: left; }}
</style></head><body>
<h1>{name}</h1>
{body}
</body></html>
"""


@dataclass(frozen=True)
class Curve:
    """One picture: lines of a metric over the steps. log: its axis is logarithmic."""

    name: str
    label: str
    keys: tuple[str, ...]
    log: bool = False


CURVES = [
    Curve("loss", "loss, nats a token", ("loss", "val_loss")),
    Curve("learning-rate", "learning rate", ("lr",)),
    Curve("gradient", "norm of the gradient, before clipping", ("grad_norm",), log=True),
    Curve("throughput", "tokens a second", ("tokens_per_s",)),
    Curve("memory", "peak memory, MB", ("memory_mb",)),
    Curve("data-wait", "share of the time spent waiting for data", ("data_wait",)),
]


def report(config: ReportConfig) -> None:
    """Write RUN/report.html and RUN/report/*.png, for each run."""
    for run in config.run:
        _report(Path(run))


def _report(run: Path) -> None:
    if not (run / "metrics.jsonl").is_file():
        raise ValueError(f"{run} is no run: it has no metrics.jsonl; name a folder that `fit` has written")
    records = read_metrics(run / "metrics.jsonl")
    (run / "report").mkdir(exist_ok=True)
    pictures = [path for curve in CURVES if (path := _curve(curve, records, run / "report"))]
    pictures += [path] if (path := _by_position(records, run / "report")) else []
    body = [_summary(records), *map(_embedded, pictures), _samples(run), _checkpoints(run), _config(run)]
    page = PAGE.format(name=html.escape(run.name), body="\n".join(body))
    replace_file(run / "report.html", lambda temporary: temporary.write_text(page, encoding="utf-8"))
    print(f"{run / 'report.html'}: {len(pictures)} pictures, also as PNG in {run / 'report'}")


def _summary(records: list[dict]) -> str:
    train = [r for r in records if "loss" in r]
    scores = [r for r in records if "val_loss" in r]
    rows = []
    if train:
        last = train[-1]
        state = "finished" if last["eta_s"] == 0 else f"{duration(last['eta_s'])} left at its last step"
        rows += [
            ("steps", f"{last['step']:,} ({state})"),
            ("tokens read", f"{last['tokens']:,}"),
            ("training loss", f"{train[0]['loss']} → {last['loss']}"),
            ("steps skipped", f"{last['skipped']}"),
        ]
    if scores:
        rows.append(("validation loss", f"{_figure_of(scores[0])} → {_figure_of(scores[-1])}"))
        finite = [r for r in scores if isinstance(r["val_loss"], int | float)]
        best = min(finite, key=lambda r: r["val_loss"], default=None)
        rows.append(("best validation", f"{_figure_of(best)} at step {best['step']:,}" if best else "none is a number"))
    return _table(rows) if rows else "<p>Nothing was recorded yet.</p>"


def _figure_of(record: dict) -> str:
    """A validation's loss; one that is no finite number was recorded as text."""
    loss = record["val_loss"]
    return f"{loss:.4f}" if isinstance(loss, int | float) else str(loss)


def _curve(curve: Curve, records: list[dict], folder: Path) -> Path | None:
    lines = {k: [(r["step"], r[k]) for r in records if isinstance(r.get(k), int | float)] for k in curve.keys}
    lines = {key: points for key, points in lines.items() if points}
    if not lines:
        return None
    figure, axes = _figure()
    for key, points in lines.items():
        axes.plot(*zip(*points, strict=True), label=key, marker="o" if key.startswith("val") else None, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel(curve.label)
    if curve.log and all(value > 0 for points in lines.values() for _, value in points):
        axes.set_yscale("log")
    if len(lines) > 1:
        axes.legend(frameon=False)
    return _saved(figure, folder / f"{curve.name}.png")


def _by_position(records: list[dict], folder: Path) -> Path | None:
    """The first and the last validation."""
    scores = [r for r in records if r.get("val_by_position")]
    if not scores:
        return None
    figure, axes = _figure()
    for record in [scores[0], scores[-1]] if len(scores) > 1 else scores:
        first, _, loss, _ = zip(*record["val_by_position"], strict=True)
        axes.plot(first, loss, marker="o", markersize=3, label=f"step {record['step']}")
    axes.set_xscale("symlog", linthresh=16)
    axes.set_xlabel("position in the document, tokens")
    axes.set_ylabel("validation loss, nats a token")
    axes.legend(frameon=False)
    return _saved(figure, folder / "by-position.png")


def _figure():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('a report needs matplotlib: pip install "rwkv_train[plots]"') from None
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _saved(figure, path: Path) -> Path:
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    return path


def _embedded(path: Path) -> str:
    return f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def _samples(run: Path) -> str:
    path = run / "samples.jsonl"
    samples = [json.loads(line) for _, line in read_lines(path)] if path.is_file() else []
    shown = [f"<pre><b>{html.escape(s['prompt'])}</b>{html.escape(s['text'])}</pre>" for s in samples]
    return "<h2>Samples</h2>" + "".join(shown) if shown else ""


def _checkpoints(run: Path) -> str:
    rows = [(path.name, f"damaged: {wrong}" if (wrong := verify(path)) else "sound") for path in run_checkpoints(run)]
    return "<h2>Checkpoints</h2>" + _table(rows) if rows else ""


def _config(run: Path) -> str:
    path = run / "config.yaml"
    text = read_text(path) if path.is_file() else "(no config.yaml)"
    return f"<h2>Settings</h2><pre>{html.escape(text)}</pre>"


def _table(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)
    return f"<table>{cells}</table>"
