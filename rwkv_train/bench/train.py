"""`bench train`: a training step beside transformers', its bare matrix products, and its exact gradient."""

import math
from collections.abc import Callable, Mapping

import torch

from rwkv_train.bench.limits import matrix_products
from rwkv_train.bench.measure import (
    DTYPES,
    Agreement,
    Times,
    about,
    agreement,
    installed,
    machine,
    need,
    one_line,
    race,
    table,
    target,
    write_json,
)
from rwkv_train.bench.models import (
    gradients,
    in_transformers,
    random_model,
    random_text,
    reference_gradients,
    size_of,
    their_names,
    training_step,
    transformers_step,
    truncated_step,
)
from rwkv_train.bench.settings import TrainBench
from rwkv_train.bench.wkv import backwards_of, forwards_of
from rwkv_train.bench.wkv_operators import OPERATORS, Case
from rwkv_train.models.base import RWKV
from rwkv_train.models.loss import IGNORE_INDEX
from rwkv_train.models.rwkv4 import RWKV4
from rwkv_train.models.rwkv7 import RWKV7

OURS = ("fp32", "bf16")
ALLOWED = {"fp32": 1e-4, "bf16": 0.03}  # relative error of the loss and of each parameter's gradient
CHECKED = 48  # tokens on which a contestant has to agree before it is timed
PEER = "transformers fp32"
# Targets, by size or (size, tokens).
OVER_PEER = {("169M", 1024): 2.1, ("169M", 2048): 2.8, ("169M", 4096): 6.0, ("256x4", 1024): 8.0}
OVER_PRODUCTS = {"169M": 1.25, "256x4": 1.6, "rwkv7-256x4": 2.5}
WKV_SHARE = {"169M": 0.02}
OVER_FP32 = 1.8
OVER_TRUNCATED = 1.4


def train(config: TrainBench) -> int:
    """Print speeds, and what follows from them beside its targets; 1 if a step of ours has wrong gradients or fails."""
    need(config.device)
    about_it = machine(config.device)
    print(about(about_it) + "\n")
    rows, ratios, wrong = [], [], False
    for name in config.sizes:
        model = random_model(size_of(name), device=config.device)
        known = isinstance(model, RWKV4) and config.peers and installed("transformers")
        peer, checked = None, check(model, config)
        if known:
            peer, checked[PEER] = check_peer(model, config)
        wrong |= any(not a.good for who, a in checked.items() if who != PEER)
        for tokens in config.tokens:
            failed: dict[str, str] = {}
            timed = times(model, peer, checked, tokens, config, failed=failed)
            wrong |= any(who.startswith("ours") for who in failed)
            rows += shown(name, tokens * config.lanes, checked, timed, failed)
            ratios += compared(name, tokens, model.config.n_layer, timed, bool(about_it["bf16 instructions"]))
        del peer
    print(table([{k: v for k, v in row.items() if k != "times"} for row in rows]), flush=True)
    exact, failed = {}, {}
    if config.chunks:
        exact = exact_times(config, failed)
        ratios += exact_ratio(exact)
        ratios += [{"what": f"{what} gradient", "found": f"failed: {reason}"} for what, reason in failed.items()]
    print("\n" + table(ratios))
    write_json(config.json, "train", config, {"rows": rows, "ratios": ratios, "exact": exact}, config.device)
    return int(wrong or bool(failed))


def check(model: RWKV, config: TrainBench) -> dict[str, Agreement]:
    """How far our loss and gradients are from the specification's in float64, on a short text."""
    text = random_text(model.config, config.lanes, CHECKED, config.device)
    if isinstance(model, RWKV7):  # its first tokens read a nearly empty state through a norm, which magnifies rounding
        text[1][:, : CHECKED // 3] = IGNORE_INDEX
    expected = reference_gradients(model, text)
    verdicts = {}
    for precision in config.precisions:
        step = training_step(model, text, precision)
        verdicts[f"ours {precision}"] = agreement(
            lambda step=step: gradients(step, model), expected, allowed=ALLOWED[precision]
        )
    return verdicts


def check_peer(model: RWKV4, config: TrainBench, precision: str = "fp32") -> tuple[torch.nn.Module | None, Agreement]:
    """The same weights in transformers, and how far its loss and gradients are off; None where it cannot be made."""
    text, allowed = random_text(model.config, config.lanes, CHECKED, config.device), ALLOWED[precision]
    try:
        peer = in_transformers(model).to(config.device)
        ours = their_names(model, peer)
    except Exception as error:  # of another version of it, whatever that may be
        return None, Agreement(math.inf, allowed, failed=one_line(error))
    step = transformers_step(peer, text[0], precision)
    found = agreement(lambda: gradients(step, peer, ours.__getitem__), reference_gradients(model, text), allowed)
    return peer, found


def times(
    model: RWKV,
    peer,
    checked: Mapping[str, Agreement],
    tokens: int,
    config: TrainBench,
    chunk_len: int | None = None,
    failed: dict[str, str] | None = None,
) -> dict[str, Times]:
    """Seconds of a step of each contestant that agrees or nearly so, of its matrix products and of its WKV.

    failed: as of `race`.
    """
    text = random_text(model.config, config.lanes, tokens, config.device)
    calls: dict[str, Callable] = {}
    for precision in config.precisions:
        if checked[f"ours {precision}"].near:
            calls[f"ours {precision}"] = training_step(model, text, precision, chunk_len)
        calls[f"products {precision}"] = matrix_products(model, tokens * config.lanes, precision)
        operator, channels = ("wkv4", model.config.n_att) if isinstance(model, RWKV4) else ("wkv7", model.config.n_embd)
        case = [Case.draw(operator, (config.lanes, tokens, channels), DTYPES[precision], config.device, resets=False)]
        calls[f"WKV forward {precision}"] = forwards_of(OPERATORS[operator].run, case)
        calls[f"WKV backward {precision}"] = backwards_of(OPERATORS[operator].run, case)
    if peer is not None and checked[PEER].near:
        calls[PEER] = transformers_step(peer, text[0])
    return race(calls, config.repeats, config.device, config.budget, failed=failed)


def shown(
    size: str, tokens: int, checked: Mapping[str, Agreement], timed: Mapping[str, Times], failed: Mapping[str, str]
) -> list[dict]:
    """The steps as people read them, with their times."""
    rows = []
    for who in dict.fromkeys([*checked, *timed, *failed]):
        if who.startswith("WKV") and who not in failed:
            continue
        row = {"size": size, "tokens": str(tokens), "who": who, "error": str(checked.get(who, "-"))}
        if who in timed:
            row |= {"tokens/s": timed[who].rate(tokens), "a step": timed[who].shown(unit="s"), "times": timed[who]}
            row["repeats"] = str(len(timed[who].seconds))
        else:
            row["tokens/s"] = f"failed: {failed[who]}" if who in failed else "refused"
        rows.append(row)
    return rows


def compared(size: str, tokens: int, layers: int, timed: Mapping[str, Times], bf16_here: bool) -> list[dict[str, str]]:
    """Ratios of medians beside their targets."""
    at, rows = f"{size}, {tokens} tokens", []

    def over(what: str, numerator: str, denominator: str, wanted: float | None, more: bool) -> None:
        if numerator in timed and denominator in timed:
            ratio = timed[numerator].median / timed[denominator].median
            rows.append(target(f"{at}: {what}", ratio, wanted, more))

    over("tokens/s over transformers, fp32", PEER, "ours fp32", OVER_PEER.get((size, tokens)), more=True)
    over("tokens/s, bf16 over fp32", "ours fp32", "ours bf16", OVER_FP32 if bf16_here else None, more=True)
    for precision in OURS:
        ours = f"ours {precision}"
        over(f"time over matrix products, {precision}", ours, f"products {precision}", OVER_PRODUCTS.get(size), False)
        share = wkv_share(timed, layers, precision)
        if share is not None:
            rows.append(target(f"{at}: WKV's share of the step, {precision}", share, WKV_SHARE.get(size), False))
    return rows


def wkv_share(timed: Mapping[str, Times], layers: int, precision: str) -> float | None:
    """Of our step's time; None where one of them has none."""
    parts = [timed.get(name) for name in (f"WKV forward {precision}", f"WKV backward {precision}", f"ours {precision}")]
    if None in parts:
        return None
    forward, backward, step = (t.median for t in parts)
    return layers * (forward + backward) / step


def exact_times(config: TrainBench, failed: dict[str, str]) -> dict[str, Times]:
    """Seconds of a long text in chunks, with the gradient through all of them and with the truncated one.

    failed: as of `race`.
    """
    model = random_model(size_of(config.exact_size), device=config.device)
    text = random_text(model.config, config.lanes, config.chunks * config.chunk_len, config.device)
    calls = {
        "exact": training_step(model, text, chunk_len=config.chunk_len),
        "truncated": truncated_step(model, text, config.chunk_len),
    }
    timed = race(calls, config.repeats, config.device, config.budget, failed=failed)
    return {f"{kind}, {config.exact_size}, {config.chunks} chunks": t for kind, t in timed.items()}


def exact_ratio(timed: Mapping[str, Times]) -> list[dict[str, str]]:
    if len(timed) < 2:
        return []
    (name, exact), (_, truncated) = timed.items()
    ratio = exact.median / truncated.median
    return [target(f"time of {name}, over truncated", ratio, OVER_TRUNCATED, more=False)]
