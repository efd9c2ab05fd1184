"""`bench wkv`: the operator's backends, forward and backward, against the specification, peers and a copy."""

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rwkv_train.bench.limits import copy_bandwidth
from rwkv_train.bench.measure import (
    DTYPES,
    Agreement,
    Times,
    about,
    agreement,
    graphed,
    installed,
    machine,
    need,
    race,
    table,
    write_json,
)
from rwkv_train.bench.settings import WkvBench
from rwkv_train.wkv import cpu, wkv4

Operator = Callable[..., tuple[Tensor, Tensor]]  # (w, u, k, v, state, reset) -> (y, state), as rwkv_train.wkv.wkv4
ALLOWED = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 1e-2, "fp16": 2e-3}  # relative error of each result and gradient
CHECKS = [(3, 37, 29), (2, 301, 67)]  # B, T, C: odd, and more than one chunk of any kernel
# Fewest bytes a token and channel: forward reads k, v and writes y; backward reads k, v, gy and writes gk, gv.
BYTES = {"fp32": (12, 20), "bf16": (6, 10)}
LOOPS, LONGEST = {"reference", "transformers"}, 2048  # a loop over the tokens in Python is tried up to so many


@dataclass(frozen=True)
class Backend:
    """An implementation to measure. ours: a disagreement is our mistake; resets: it knows them."""

    run: Operator
    ours: bool = True
    resets: bool = True


def backends(device: str) -> dict[str, Backend]:
    """Ours on a device."""
    if device == "cuda":
        return {name: Backend(run) for name, run in cuda_paths().items()} | {"torch": Backend(_by("torch"))}
    names = ["cpu"] * cpu.available() + ["torch", "reference"]
    return {name: Backend(_by(name)) for name in names}


def dtypes_of(backend: Backend) -> list[str]:
    """The number formats it has to agree in: peers have no float64."""
    return [dtype for dtype in DTYPES if backend.ours or dtype != "fp64"]


def cuda_paths() -> dict[str, Operator]:
    """The CUDA kernels as they choose for themselves, and each of their two ways by force."""
    from rwkv_train.wkv import cuda

    return {"cuda": _by("cuda")} | {f"cuda, {p}": partial(cuda.wkv4, path=p) for p in ("serial", "chunked")}


def _by(name: str) -> Operator:
    return partial(wkv4, backend=name)


def peers(device: str) -> dict[str, Backend]:
    """Other programs' operators, behind our signature, if they are installed."""
    found = {}
    if device == "cpu" and installed("transformers"):
        found["transformers"] = Backend(_transformers, ours=False, resets=False)
    if device == "cuda" and installed("fla-core"):
        found["fla"] = Backend(_fla, ours=False, resets=False)
    return found


def _transformers(w, u, k, v, state, reset=None):
    module = importlib.import_module("transformers.models.rwkv.modeling_rwkv")
    y, state = module.rwkv_linear_attention_cpu(torch.log(-w), u, k, v, state.unbind(1), return_state=True)
    return y, torch.stack(state, 1)


def _fla(w, u, k, v, state, reset=None):
    module = importlib.import_module("fla.ops.rwkv4")
    y, state = module.fused_recurrent_rwkv4(torch.log(-w), u, k, v, state[:, :, None])
    return y, state[:, :, 0]


@dataclass(frozen=True)
class Case:
    """Inputs of the operator and gradients that arrive on its results."""

    inputs: tuple[Tensor, ...]  # w, u, k, v, state
    reset: Tensor | None
    arriving: tuple[Tensor, Tensor]

    @classmethod
    def draw(cls, shape: tuple[int, int, int], dtype: torch.dtype, device: str, resets: bool, seed: int = 0) -> "Case":
        """Decays, bonuses and keys of a trained model's size, a state that has seen text; shape is B, T, C."""
        B, T, C = shape
        rng = torch.Generator().manual_seed(seed)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        normal = partial(torch.randn, generator=rng, dtype=wide)
        w, u = -torch.exp(normal(C) * 2 - 2), normal(C)
        k, v, gy = (normal(B, T, C).to(dtype) for _ in range(3))
        state = torch.stack([normal(B, C), torch.rand(B, C, generator=rng, dtype=wide) + 0.5, normal(B, C)], 1)
        reset = (torch.rand(B, T, generator=rng) < 0.05).to(device) if resets else None
        inputs = tuple(x.to(device).requires_grad_() for x in (w, u, k, v, state))
        return cls(inputs, reset, (gy.to(device), normal(B, 3, C).to(device)))

    def results(self, run: Operator) -> dict[str, Tensor]:
        """Both results, and the gradients of all inputs."""
        out = run(*self.inputs, self.reset)
        slopes = torch.autograd.grad(out, self.inputs, self.arriving_as(out))
        names = ("y", "state", *(f"gradient of {name}" for name in ("w", "u", "k", "v", "state")))
        return dict(zip(names, (*out, *slopes), strict=True))

    def arriving_as(self, out: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [g.to(o.dtype) for g, o in zip(self.arriving, out, strict=True)]

    def double(self) -> "Case":
        """The same numbers in float64, on the CPU."""
        inputs = tuple(x.detach().double().cpu().requires_grad_() for x in self.inputs)
        reset = None if self.reset is None else self.reset.cpu()
        return Case(inputs, reset, tuple(g.double().cpu() for g in self.arriving))


def check(backend: Backend, dtype: str, device: str) -> Agreement:
    """The worst disagreement with the specification in float64: odd sizes, carried state, all gradients, resets."""
    found = []
    for shape in CHECKS:
        for resets in {False, backend.resets}:
            case = Case.draw(shape, DTYPES[dtype], device, resets)
            expected = case.double().results(_by("reference"))
            found.append(agreement(lambda case=case: case.results(backend.run), expected, ALLOWED[dtype]))
    return max(found, key=lambda a: a.error)


def times(
    runs: Mapping[str, Operator], shape: tuple[int, int, int], dtype: str, device: str, repeats: int, budget: float
) -> tuple[dict[str, tuple[Times, Times]], str]:
    """Seconds of each operator's forward, as in training, and backward; and how a GPU's kernels were started."""
    each = 3 * math.prod(shape) * DTYPES[dtype].itemsize
    several = range(min(64, math.ceil(3 * _cache(device) / each)))
    cases = [Case.draw(shape, DTYPES[dtype], device, False, seed) for seed in several]
    calls, how = {}, set()
    for name, run in runs.items():
        for kind, call in (("forward", forwards_of(run, cases)), ("backward", backwards_of(run, cases))):
            calls[name, kind], started = graphed(call, device)
            how.add(started)
    raced = race(calls, repeats, device, budget)
    raced = {key: Times([s / len(cases) for s in t.seconds]) for key, t in raced.items()}
    return {name: (raced[name, "forward"], raced[name, "backward"]) for name in runs}, ", ".join(sorted(how))


def _cache(device: str) -> int:
    """Bytes that a GPU's cache could keep from one call to the next."""
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 1 << 26) if device == "cuda" else 1


def forwards_of(run: Operator, cases: list[Case]) -> Callable[[], None]:
    def forwards() -> None:
        for case in cases:
            run(*case.inputs, None)

    return forwards


def backwards_of(run: Operator, cases: list[Case]) -> Callable[[], None]:
    kept: list[tuple[Tensor, Tensor]] = []

    def backwards() -> None:
        if not kept:  # here and not before: a backward runs on the stream of its forward
            kept.extend(run(*case.inputs, None) for case in cases)
        for case, out in zip(cases, kept, strict=True):
            torch.autograd.grad(out, case.inputs, case.arriving_as(out), retain_graph=True)

    return backwards


def measured(
    found: Mapping[str, Backend],
    checked: Mapping[str, Agreement],
    shape: tuple[int, int, int],
    dtype: str,
    device: str,
    repeats: int,
    budget: float,
    bandwidth: float,
) -> list[dict[str, object]]:
    """One row for each backend: its error, and its times if it agrees with the specification."""
    tried = {n: b.run for n, b in found.items() if checked[n].good and (n not in LOOPS or shape[1] <= LONGEST)}
    timed, how = times(tried, shape, dtype, device, repeats, budget)
    rows = []
    for name, backend in found.items():
        row = {"B x T x C": "x".join(map(str, shape)), "dtype": dtype, "backend": name, "error": checked[name]}
        row["ours"] = backend.ours
        if name in timed:
            row |= {"forward": timed[name][0], "backward": timed[name][1], "started as": how}
            row["copy share"] = [
                b * math.prod(shape) / bandwidth / t.median for b, t in zip(BYTES[dtype], timed[name], strict=True)
            ]
        rows.append(row)
    return rows


def shown(row: Mapping, unit: str = "ms") -> dict[str, str]:
    """A row as people read it."""
    cells = {name: str(row[name]) for name in ("B x T x C", "dtype", "backend", "error")}
    if "forward" not in row:
        return cells | {"forward": f"not run: over {LONGEST:,} tokens" if row["error"].good else "refused"}
    both = row["forward"].median + row["backward"].median
    cells |= {kind: row[kind].shown(1, unit) for kind in ("forward", "backward")}
    elements = math.prod(map(int, row["B x T x C"].split("x")))
    cells["ns a token-channel"] = f"{both * 1e9 / elements:.3g}"
    return cells | {"share of a copy's bandwidth": " / ".join(f"{share:.1%}" for share in row["copy share"])}


def wkv(config: WkvBench) -> int:
    """Print the table; 1 if a backend of ours disagrees with the specification."""
    need(config.device)
    print(about(machine(config.device)))
    bandwidth = copy_bandwidth(config.device)
    print(f"copy: {bandwidth / 1e9:.1f} GB/s\n")
    found = backends(config.device) | peers(config.device)
    rows = []
    for dtype in config.dtypes:
        checked = {name: check(backend, dtype, config.device) for name, backend in found.items()}
        for tokens in config.tokens:
            shape = (config.lanes, tokens, config.channels)
            rows += measured(found, checked, shape, dtype, config.device, config.repeats, config.budget, bandwidth)
    print(table([shown(row) for row in rows]))
    write_json(config.json, "wkv", config, {"copy bytes/s": bandwidth, "rows": rows}, config.device)
    return int(any(row["ours"] and not row["error"].good for row in rows))
