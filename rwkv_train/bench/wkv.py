"""`bench wkv`: the operators' backends, forward and backward, against the specification, peers and a copy."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rwkv_train.bench.limits import copy_bandwidth
from rwkv_train.bench.measure import (
    DTYPES,
    Agreement,
    Times,
    about,
    graphed,
    machine,
    need,
    race,
    table,
    write_json,
)
from rwkv_train.bench.settings import WkvBench
from rwkv_train.bench.wkv_operators import (
    LONGEST,
    LOOPS,
    OPERATORS,
    Backend,
    Case,
    Run,
    backends,
    check,
    launches,
    peers,
)


def times(
    operator: str,
    runs: Mapping[str, Run],
    shape: tuple[int, int, int],
    dtype: str,
    device: str,
    repeats: int,
    budget: float,
) -> tuple[dict[str, tuple[Times, Times]], dict[str, str], str]:
    """Seconds of each operator's forward, as in training, and backward; of those that fail, the reason; and how a
    GPU's kernels were started."""
    each = OPERATORS[operator].streams[dtype][0] * math.prod(shape)
    several = range(min(64, math.ceil(3 * _cache(device) / each)))
    cases = [Case.draw(operator, shape, DTYPES[dtype], device, False, seed) for seed in several]
    calls, how = {}, set()
    for name, run in runs.items():
        for kind, call in (("forward", forwards_of(run, cases)), ("backward", backwards_of(run, cases))):
            calls[name, kind], started = graphed(call, device)
            how.add(started)
    failed: dict[tuple[str, str], str] = {}
    raced = race(calls, repeats, device, budget, failed=failed)
    raced = {key: Times([s / len(cases) for s in t.seconds]) for key, t in raced.items()}
    reasons = {name: f"{kind} failed: {reason}" for (name, kind), reason in failed.items()}
    whole = {n: (raced[n, "forward"], raced[n, "backward"]) for n in runs if n not in reasons}
    return whole, reasons, ", ".join(sorted(how))


def _cache(device: str) -> int:
    """Bytes that a GPU's cache could keep from one call to the next."""
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 1 << 26) if device == "cuda" else 1


def forwards_of(run: Run, cases: list[Case]) -> Callable[[], None]:
    def forwards() -> None:
        for case in cases:
            run(*case.inputs, None)

    return forwards


def backwards_of(run: Run, cases: list[Case]) -> Callable[[], None]:
    kept: list[tuple[Tensor, Tensor]] = []

    def backwards() -> None:
        if not kept:  # here and not before: a backward runs on the stream of its forward
            kept.extend(run(*case.inputs, None) for case in cases)
        for case, out in zip(cases, kept, strict=True):
            torch.autograd.grad(out, case.inputs, case.arriving_as(out), retain_graph=True)

    return backwards


def measured(
    operator: str,
    contestants: Mapping[str, Backend],
    checked: Mapping[str, Agreement],
    shape: tuple[int, int, int],
    dtype: str,
    device: str,
    repeats: int,
    budget: float,
    bandwidth: float,
) -> list[dict[str, object]]:
    """One row for each backend: its error, and its times if it agrees with the specification or nearly so."""
    tried = {n: b.run for n, b in contestants.items() if checked[n].near and (n not in LOOPS or shape[1] <= LONGEST)}
    timed, failed, how = times(operator, tried, shape, dtype, device, repeats, budget)
    rows = []
    for name, backend in contestants.items():
        row = {"operator": operator, "B x T x C": "x".join(map(str, shape)), "dtype": dtype, "backend": name}
        row |= {"error": checked[name], "wrong": backend.ours and (not checked[name].good or name in failed)}
        if name not in timed:
            untried = f"not run: over {LONGEST:,} tokens" if checked[name].near else "refused"
            row["why not"] = failed.get(name, untried)
        else:
            row |= {"forward": timed[name][0], "backward": timed[name][1], "started as": how}
            row["copy share"] = [
                b * math.prod(shape) / bandwidth / t.median
                for b, t in zip(OPERATORS[operator].streams[dtype], timed[name], strict=True)
            ]
        rows.append(row)
    return rows


def shown(row: Mapping, unit: str = "ms") -> dict[str, str]:
    """A row as people read it."""
    cells = {name: str(row[name]) for name in ("operator", "B x T x C", "dtype", "backend", "error")}
    if "forward" not in row:
        return cells | {"forward": row["why not"]}
    both = row["forward"].median + row["backward"].median
    cells |= {kind: row[kind].shown(1, unit) for kind in ("forward", "backward")}
    elements = math.prod(map(int, row["B x T x C"].split("x")))
    cells["ns a token-channel"] = f"{both * 1e9 / elements:.3g}"
    return cells | {"share of a copy's bandwidth": " / ".join(f"{share:.1%}" for share in row["copy share"])}


def wkv(config: WkvBench) -> int:
    """Print the table; 1 if a backend of ours disagrees with the specification or fails."""
    need(config.device)
    print(about(machine(config.device)))
    bandwidth = copy_bandwidth(config.device)
    print(f"copy: {bandwidth / 1e9:.1f} GB/s\n")
    rows = []
    for operator in config.operators:
        contestants = backends(operator, config.device) | peers(operator, config.device)
        for dtype in config.dtypes:
            checked, ran = {}, {}
            for name, backend in contestants.items():
                with launches() as ran[name]:
                    checked[name] = check(operator, backend, dtype, config.device)
            for tokens in config.tokens:
                shape = (config.lanes, tokens, config.channels)
                limits = (config.device, config.repeats, config.budget, bandwidth)
                found = measured(operator, contestants, checked, shape, dtype, *limits)
                rows += [row | {"checked kernels": ran[row["backend"]]} for row in found]
    print(table([shown(row) for row in rows]))
    write_json(config.json, "wkv", config, {"copy bytes/s": bandwidth, "rows": rows}, config.device)
    return int(any(row["wrong"] for row in rows))
