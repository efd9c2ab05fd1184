"""`bench wkv`: the operators' backends, forward and backward, against the specification, peers and a copy."""

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
from rwkv_train.bench.models import head_size
from rwkv_train.bench.settings import WkvBench
from rwkv_train.ops import build_cpu, wkv4_cuda
from rwkv_train.ops.wkv4 import wkv4
from rwkv_train.ops.wkv7 import wkv7

Run = Callable[..., tuple[Tensor, Tensor]]  # (*inputs, reset) -> (y, state), as wkv4 and wkv7 of rwkv_train.wkv
ALLOWED = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 1e-2, "fp16": 2e-3}  # relative error of each result and gradient
LOOPS, LONGEST = {"reference", "transformers"}, 2048  # a loop over the tokens in Python is tried up to so many


def _draw4(shape, dtype, normal, share) -> tuple[Tensor, ...]:
    """Decays, bonuses and keys of a trained model's size, a state that has seen text."""
    B, _, C = shape
    w, u = -torch.exp(normal(C) * 2 - 2), normal(C)
    state = torch.stack([normal(B, C), share(B, C) + 0.5, normal(B, C)], 1)
    return w, u, normal(*shape).to(dtype), normal(*shape).to(dtype), state


def _draw7(shape, dtype, normal, share) -> tuple[Tensor, ...]:
    """As a model makes them, see `rwkv_train.wkv.wkv7`."""
    B, T, C = shape
    N = head_size(C)
    heads = B, T, C // N, N
    kk = torch.nn.functional.normalize(normal(*heads), dim=-1)
    r, k, v = (normal(*heads).to(dtype) for _ in range(3))
    return r, -0.6065 * share(*heads), k, v, -kk, kk * share(*heads), normal(B, C // N, N, N)


@dataclass(frozen=True)
class Operator:
    """What is measured. checks: B, T, C, odd, and more than one chunk of any kernel; streams: bytes that a token and
    channel moves at the least, forward and backward."""

    run: Run
    inputs: str  # their names
    draw: Callable[..., tuple[Tensor, ...]]
    checks: list[tuple[int, int, int]]
    streams: Mapping[str, tuple[int, int]]

    def backend(self, name: str) -> Run:
        return partial(self.run, backend=name)


OPERATORS = {
    # forward reads k, v and writes y; backward reads k, v, gy and writes gk, gv
    "wkv4": Operator(wkv4, "w u k v state", _draw4, [(3, 37, 29), (2, 301, 67)], {"fp32": (12, 20), "bf16": (6, 10)}),
    # r, w, k, v, a, b and y; these and their gradients; w, a and b are float32
    "wkv7": Operator(
        wkv7, "r w k v a b state", _draw7, [(2, 37, 21), (2, 131, 128)], {"fp32": (28, 52), "bf16": (20, 38)}
    ),
}


@dataclass(frozen=True)
class Backend:
    """An implementation to measure. ours: a disagreement is our mistake; resets: it knows them."""

    run: Run
    ours: bool = True
    resets: bool = True


def backends(operator: str, device: str) -> dict[str, Backend]:
    """Ours on a device, the one that "auto" takes first."""
    of = OPERATORS[operator].backend
    if device == "cuda":
        ways = (
            {f"cuda, {p}": partial(wkv4_cuda.wkv4, path=p) for p in ("serial", "chunked")} if operator == "wkv4" else {}
        )
        return {name: Backend(run) for name, run in ({"cuda": of("cuda")} | ways | {"torch": of("torch")}).items()}
    names = ["cpu"] * build_cpu.available() + ["torch", "reference"]
    return {name: Backend(of(name)) for name in names}


def dtypes_of(backend: Backend) -> list[str]:
    """The number formats it has to agree in: peers have no float64."""
    return [dtype for dtype in DTYPES if backend.ours or dtype != "fp64"]


def peers(operator: str, device: str) -> dict[str, Backend]:
    """Other programs' operators, behind our signature, if they are installed."""
    others = {}
    if operator == "wkv4" and device == "cpu" and installed("transformers"):
        others["transformers"] = Backend(_transformers, ours=False, resets=False)
    if device == "cuda" and installed("fla-core"):
        run = _fla if operator == "wkv4" else OPERATORS[operator].backend("fla")
        others["fla"] = Backend(run, ours=False, resets=operator == "wkv7")
    return others


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
    """Inputs of an operator and gradients that arrive on its results."""

    operator: str
    inputs: tuple[Tensor, ...]
    reset: Tensor | None
    arriving: tuple[Tensor, Tensor]

    @classmethod
    def draw(
        cls,
        operator: str,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: str,
        resets: bool,
        seed: int = 0,
    ) -> "Case":
        """shape: B, T, C."""
        rng = torch.Generator().manual_seed(seed)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        normal, share = (partial(draw, generator=rng, dtype=wide) for draw in (torch.randn, torch.rand))
        inputs = OPERATORS[operator].draw(shape, dtype, normal, share)
        reset = (torch.rand(shape[:2], generator=rng) < 0.05).to(device) if resets else None
        y, state = inputs[2], inputs[-1]  # of their shapes
        arriving = normal(*y.shape).to(dtype).to(device), normal(*state.shape).to(device)
        return cls(operator, tuple(x.to(device).requires_grad_() for x in inputs), reset, arriving)

    def results(self, run: Run) -> dict[str, Tensor]:
        """Both results, and the gradients of all inputs."""
        out = run(*self.inputs, self.reset)
        slopes = torch.autograd.grad(out, self.inputs, self.arriving_as(out))
        names = ("y", "state", *(f"gradient of {name}" for name in OPERATORS[self.operator].inputs.split()))
        return dict(zip(names, (*out, *slopes), strict=True))

    def arriving_as(self, out: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [g.to(o.dtype) for g, o in zip(self.arriving, out, strict=True)]

    def double(self) -> "Case":
        """The same numbers in float64, on the CPU."""
        inputs = tuple(x.detach().double().cpu().requires_grad_() for x in self.inputs)
        reset = None if self.reset is None else self.reset.cpu()
        return Case(self.operator, inputs, reset, tuple(g.double().cpu() for g in self.arriving))


def check(operator: str, backend: Backend, dtype: str, device: str) -> Agreement:
    """The worst disagreement with the specification in float64: odd sizes, carried state, all gradients, resets."""
    verdicts = []
    for shape in OPERATORS[operator].checks:
        for resets in {False, backend.resets}:
            case = Case.draw(operator, shape, DTYPES[dtype], device, resets)
            expected = case.double().results(OPERATORS[operator].backend("reference"))
            verdicts.append(agreement(lambda case=case: case.results(backend.run), expected, ALLOWED[dtype]))
    return max(verdicts, key=lambda a: a.error)


def times(
    operator: str,
    runs: Mapping[str, Run],
    shape: tuple[int, int, int],
    dtype: str,
    device: str,
    repeats: int,
    budget: float,
) -> tuple[dict[str, tuple[Times, Times]], str]:
    """Seconds of each operator's forward, as in training, and backward; and how a GPU's kernels were started."""
    each = OPERATORS[operator].streams[dtype][0] * math.prod(shape)
    several = range(min(64, math.ceil(3 * _cache(device) / each)))
    cases = [Case.draw(operator, shape, DTYPES[dtype], device, False, seed) for seed in several]
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
    """One row for each backend: its error, and its times if it agrees with the specification."""
    tried = {n: b.run for n, b in contestants.items() if checked[n].good and (n not in LOOPS or shape[1] <= LONGEST)}
    timed, how = times(operator, tried, shape, dtype, device, repeats, budget)
    rows = []
    for name, backend in contestants.items():
        row = {"operator": operator, "B x T x C": "x".join(map(str, shape)), "dtype": dtype, "backend": name}
        row |= {"error": checked[name], "ours": backend.ours}
        if name in timed:
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
    rows = []
    for operator in config.operators:
        contestants = backends(operator, config.device) | peers(operator, config.device)
        for dtype in config.dtypes:
            checked = {name: check(operator, backend, dtype, config.device) for name, backend in contestants.items()}
            for tokens in config.tokens:
                shape = (config.lanes, tokens, config.channels)
                limits = (config.device, config.repeats, config.budget, bandwidth)
                rows += measured(operator, contestants, checked, shape, dtype, *limits)
    print(table([shown(row) for row in rows]))
    write_json(config.json, "wkv", config, {"copy bytes/s": bandwidth, "rows": rows}, config.device)
    return int(any(row["ours"] and not row["error"].good for row in rows))
