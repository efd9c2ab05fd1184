"""What a benchmark of corrections shows: its measures beside their targets, by kind of case, and as a picture."""

import math
from pathlib import Path
from typing import NamedTuple

# More is better for all others.
LESS_IS_BETTER = {
    "leaks",
    "neighbours changed",
    "same subject changed",
    "perplexity rise",
    "time over generation, p50",
    "time over generation, p95",
    "received in, p95",
    "seconds",
}
UNITS = {
    "perplexity rise": "{:.2%}",
    "time over generation": "{:.1f} x",
    "received in": "{:.1f} ms",
    "seconds": "{:.2f}",
    "cases": "{:.0f}",
}
BY_KIND = {
    "cases": "cases",
    "newest, empty state": "newest, empty",
    "newest, unrelated state": "after a text",
    "newest, dialogue state": "in a dialogue",
    "all retained": "retained",
    "leaks": "leaks",
    "neighbours as before": "as before",
    "paraphrases alike to the base": "alike",
    "paraphrases": "paraphrases",
    "other paraphrases": "other paraphrases",
    "unrelated identical": "unrelated",
    "unread identical": "unread",
    "perplexity rise": "perplexity",
    "accepted": "accepted",
}

Results = dict[str, dict[str, dict]]  # column: measure: {"mean", "worst"} over seeds


class Targets(NamedTuple):
    """The measures of a table, each with its target after so many corrections; None where it makes no sense."""

    counts: tuple[int, ...]
    measures: dict[str, tuple[float | None, ...]]


COUNTRIES = Targets(
    (1, 10, 100),
    {
        "newest, empty state": (0.99, 0.99, 0.98),
        "newest, unrelated state": (0.97, 0.97, 0.95),
        "newest, dialogue state": (0.97, 0.97, 0.95),
        "all retained": (None, 0.99, 0.97),
        "paraphrases": (0.90, 0.90, 0.85),
        "neighbours changed": (0.01, 0.03, 0.08),
        "same subject changed": (0.01, 0.03, 0.08),
        "unrelated identical": (0.99, 0.98, 0.92),
        "unread identical": (),
        "perplexity rise": (0.001, 0.005, 0.02),
        "time over generation, p50": (20.0,) * 3,
        "time over generation, p95": (40.0,) * 3,
        "received in, p95": (0.05,) * 3,
        "accepted": (),
        "seconds": (),
    },
)
OPEN = Targets(
    (1, 30, 100, 1000),
    {
        "newest, empty state": (0.99, 0.99, 0.98, 0.97),
        "newest, unrelated state": (0.97, 0.97, 0.97, 0.95),
        "newest, dialogue state": (0.97, 0.97, 0.97, 0.95),
        "all retained": (None, 0.99, 0.99, 0.95),
        "leaks": (0.02, 0.04, 0.04, 0.06),
        "neighbours as before": (0.92, 0.85, 0.85, 0.75),
        "paraphrases alike to the base": (0.90, 0.90, 0.88, 0.85),
        "paraphrases": (0.50, 0.50, 0.45, 0.40),
        "other paraphrases": (0.65, 0.60, None, None),
        "alike, of the paraphrases": (),
        "unrelated identical": (0.99, 0.98, 0.96, 0.92),
        "unread identical": (0.99, 0.98, 0.96, 0.92),
        "perplexity rise": (0.001, 0.004, 0.01, 0.03),
        "time over generation, p50": (15.0,) * 4,
        "time over generation, p95": (),
        "received in, p95": (),
        "accepted": (),
        "seconds": (),
    },
)


def table(results: Results, targets: Targets) -> str:
    """A table in Markdown: measures, "mean (worst seed)" in a column for each recipe and number, their targets.

    The worst seed is left out where it shows the same."""
    rows = [["measure", *results, f"target {' / '.join(map(str, targets.counts))}"]]
    for name, wanted in targets.measures.items():
        if not any(name in figures for figures in results.values()):
            continue
        shown = ["-" if t is None else _shown(name, t) for t in wanted]
        shown = shown[:1] if len(set(shown)) == 1 else shown
        sign = "≤ " if name in LESS_IS_BETTER else "≥ "
        rows.append([name, *(_cell(name, r) for r in results.values()), sign + " / ".join(shown) if shown else ""])
    return _markdown(rows)


def kinds_table(kinds: dict[str, Results]) -> str:
    """A row for each kind of case of each column: "mean (worst seed)"; kinds: as results, by column and kind."""
    every = [figures for found in kinds.values() for figures in found.values()]
    names = {name: title for name, title in BY_KIND.items() if any(name in figures for figures in every)}
    rows = [["", "kind", *names.values()]]
    for column, found in kinds.items():
        rows += [[column, kind, *(_cell(name, figures) for name in names)] for kind, figures in found.items()]
    return _markdown(rows)


def line(figures: dict[str, dict], targets: Targets) -> str:
    """The means of a column in one line."""
    names = [name for name in targets.measures if name in figures]
    return ", ".join(f"{name} {_shown(name, figures[name]['mean'])}" for name in names)


def _cell(name: str, figures: dict[str, dict]) -> str:
    mean, worst = (_shown(name, value) for value in figures.get(name, {"mean": math.nan, "worst": math.nan}).values())
    return mean if mean == worst else f"{mean} ({worst})"


def _markdown(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows)


def plot(results: Results, path: str | Path, targets: Targets) -> None:
    """What goes wrong after corrections, by recipe: a picture in the format that the path's ending names."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('a plot needs matplotlib: pip install "rwkv_train[plots]"') from None
    known = {name for figures in results.values() for name in figures}
    names = [n for n, wanted in targets.measures.items() if n in known and wanted and not n.startswith(tuple(UNITS))]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(results)
    for i, (recipe, figures) in enumerate(results.items()):
        means = [figures.get(name, {"mean": math.nan})["mean"] for name in names]
        places = [place + (i - len(results) / 2 + 0.5) * height for place in range(len(names))]
        axes.barh(places, [_wrong(n, mean) for n, mean in zip(names, means, strict=True)], height, label=recipe)
    wanted = [next(t for t in targets.measures[n][1:] if t is not None) for n in names]
    wanted = [_wrong(n, t) for n, t in zip(names, wanted, strict=True)]
    label = f"target, N={targets.counts[1]}"
    axes.scatter(wanted, range(len(names)), marker="|", s=700, color="black", label=label, zorder=3)
    axes.set_yticks(range(len(names)), [n if n in LESS_IS_BETTER else f"{n}: not" for n in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of answers that are not as they should be; shorter is better")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _wrong(name: str, share: float) -> float:
    return share if name in LESS_IS_BETTER else 1 - share


def _shown(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    unit = next((u for begin, u in UNITS.items() if name.startswith(begin)), "{:.1%}")
    return unit.format(value * 1e3 if unit.endswith("ms") else value)
