"""`bench memory`: training memory by length of the text, each point a process of its own."""

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.bench.apart import Apart, apart, peak_mb
from rwkv_train.bench.measure import about, installed, machine, number, table, target, write_json
from rwkv_train.bench.models import (
    quiet_transformers,
    random_model,
    random_text,
    size_of,
    training_step,
    transformers_step,
    truncated_step,
)
from rwkv_train.bench.settings import MemoryBench
from rwkv_train.models.adapters import tune
from rwkv_train.models.base import RWKV
from rwkv_train.models.loss import token_nll

TRUNCATED, EXACT = "ours, truncated", "ours, exact"
INFERENCE, LORA, KEPT = "inference", "training low-rank factors", "the same, activations kept"
PEERS = ("transformers RWKV-4", "transformers GPT-NeoX")
OVER_TRUNCATED = 1.1  # the most that exact gradients may hold over truncated ones
OVER_INFERENCE = 1.6  # the most that training low-rank factors may hold over reading
FLAT = 1.1  # the most that the longest text may hold over the shortest one of several chunks


def memory(config: MemoryBench) -> None:
    """Print the table, and draw it."""
    size_of(config.size)
    print(about(machine()) + "\n")
    kinds = [EXACT, TRUNCATED, *(PEERS if config.peers and installed("transformers") else ())]
    measured: dict[str, dict[int, Apart]] = {kind: {} for kind in kinds}
    for length in sorted(config.lengths):
        for kind, points in measured.items():
            ended = next((p for p in points.values() if p.why_not), None)
            points[length] = ended or _point(kind, length, config)
    lengths = sorted(config.lengths)
    print(table([{"tokens": f"{n:,}"} | {kind: _shown(measured[kind][n]) for kind in kinds} for n in lengths]))
    ratios = compared(measured, config)
    if config.lora_size:
        length, rows = 2 * config.chunk_len, []
        for size in (config.lora_size, f"rwkv7-{config.lora_size}"):
            points = {kind: _point(kind, length, replace(config, size=size)) for kind in (INFERENCE, LORA, KEPT)}
            rows.append({"size": size} | {kind: _shown(p) for kind, p in points.items()})
            measured |= {f"{size}, {kind}": {length: point} for kind, point in points.items()}
            if points[LORA].peak_mb and points[INFERENCE].peak_mb:
                ratio = points[LORA].peak_mb / points[INFERENCE].peak_mb
                what = f"{size}: {LORA} over {INFERENCE}, chunks of {config.chunk_len}"
                ratios.append(target(what, ratio, OVER_INFERENCE, more=False))
        print(f"\n{table(rows)}")
    print(f"\n{table(ratios)}")
    results = {k: {n: p.__dict__ for n, p in points.items()} for k, points in measured.items()}
    write_json(config.json, "memory", config, {"points": results, "ratios": ratios})
    if config.plot:
        plot({kind: measured[kind] for kind in kinds}, config.plot)


def _point(kind: str, length: int, config: MemoryBench) -> Apart:
    limits = (config.limit_gb, config.limit_s) if kind in PEERS else (math.inf, math.inf)
    arguments = {"kind": kind, "length": length, "size": config.size, "chunk_len": config.chunk_len}
    return apart(f"{__name__}:step", *limits, threads=torch.get_num_threads(), **arguments)


def step(kind: str, length: int, size: str, chunk_len: int, threads: int) -> dict[str, float]:
    """One forward and backward: its seconds, and the process's peak in MB before it, with the model loaded."""
    torch.set_num_threads(threads)
    config = size_of(size)
    text = random_text(config, 1, length)
    if kind in PEERS:
        run = transformers_step(_peer(kind, config, length), text[0])
    else:
        model = random_model(config)
        if kind in (LORA, KEPT):
            tune(model, "lora", rank=16)
        runs = {
            EXACT: training_step(model, text, "fp32", chunk_len),
            INFERENCE: lambda: _read(model, text[0], chunk_len),
        }
        run = runs.get(kind) or truncated_step(model, text, chunk_len, checkpoint_blocks=kind == LORA)
    loaded, begun = peak_mb(), time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - begun, "loaded_mb": loaded}


@torch.inference_mode()
def _read(model: RWKV, tokens: Tensor, chunk_len: int) -> None:
    """As `validate` does: the loss of every token, the state carried on."""
    state = None
    for chunk in tokens.split(chunk_len, 1):
        x, state = model.hidden(chunk, state)
        token_nll(x, model.head.weight, chunk)


def _peer(kind: str, c, length: int) -> torch.nn.Module:
    """A fresh model of transformers: its RWKV-4, or a transformer of the same width, depth and vocabulary."""
    transformers = quiet_transformers()
    sizes = {"vocab_size": c.vocab_size, "hidden_size": c.n_embd, "num_hidden_layers": c.n_layer, "use_cache": False}
    if kind == PEERS[0]:
        return transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes)).train()
    heads = max(1, c.n_embd // 64)
    sizes |= {"num_attention_heads": heads, "intermediate_size": c.n_ffn, "max_position_embeddings": length}
    settings = transformers.GPTNeoXConfig(**sizes, attn_implementation="sdpa", hidden_dropout=0.0)
    return transformers.GPTNeoXForCausalLM(settings).train()


def _shown(point: Apart) -> str:
    if point.why_not:
        return f"not run: {point.why_not}"
    return f"{number(point.peak_mb)} MB, {point.result['seconds']:.3g} s"


def compared(points_of: Mapping[str, Mapping[int, Apart]], config: MemoryBench) -> list[dict[str, str]]:
    """Is memory flat, and what does the exact gradient add? At the longest text that was measured."""
    rows = []
    for kind in (TRUNCATED, EXACT):
        peaks = {n: p.peak_mb for n, p in points_of[kind].items() if p.peak_mb and n >= 2 * config.chunk_len}
        if len(peaks) > 1:
            (first, least), *_, (last, most) = sorted(peaks.items())
            rows.append(target(f"{kind}: peak at {last:,} over {first:,} tokens", most / least, FLAT, more=False))
    both = [n for n in points_of[EXACT] if points_of[EXACT][n].peak_mb and points_of[TRUNCATED][n].peak_mb]
    if both:
        ratio = points_of[EXACT][max(both)].peak_mb / points_of[TRUNCATED][max(both)].peak_mb
        rows.append(target(f"exact over truncated at {max(both):,} tokens", ratio, OVER_TRUNCATED, more=False))
    return rows


def plot(measured: Mapping[str, Mapping[int, Apart]], path: str | Path) -> None:
    """Peak memory against the length of the text, both in powers: a picture in the format of the path's ending."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('a plot needs matplotlib: pip install "rwkv_train[plots]"') from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, points in measured.items():
        done = {n: p.peak_mb for n, p in points.items() if p.peak_mb}
        (line,) = axes.plot(done.keys(), done.values(), marker="o", label=kind)
        stopped = next((f"{p.why_not} at {n:,}" for n, p in points.items() if p.why_not), None)
        if stopped and done:
            at = max(done)
            axes.annotate(stopped, (at, done[at]), (6, 4), textcoords="offset points", color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    axes.set_xlabel("tokens of the text")
    axes.set_ylabel("peak memory of one forward and backward, MB")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
