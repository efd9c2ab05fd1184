"""The WKV operators as they are measured: ours and others', inputs to run them on, and whether they agree."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from rwkv_train.bench.measure import DTYPES, Agreement, agreement, installed
from rwkv_train.bench.models import head_size, quiet_transformers
from rwkv_train.ops import build_cpu, build_cuda, wkv4_cuda
from rwkv_train.ops.wkv4 import wkv4
from rwkv_train.ops.wkv7 import wkv7

Run = Callable[..., tuple[Tensor, Tensor]]  # (*inputs, reset) -> (y, state), as wkv4 and wkv7 of rwkv_train.wkv
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
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
    """What is measured.

    checks: B, T, C, odd, and more than one chunk of any kernel. large: others, on a GPU only, where size picks the
    kernels that training runs. streams: bytes that a token and channel moves at the least, forward and backward.
    """

    run: Run
    inputs: str  # their names
    draw: Callable[..., tuple[Tensor, ...]]
    checks: list[tuple[int, int, int]]
    large: list[tuple[int, int, int]]
    streams: Mapping[str, tuple[int, int]]

    def backend(self, name: str) -> Run:
        return partial(self.run, backend=name)


OPERATORS = {
    # forward reads k, v and writes y; backward reads k, v, gy and writes gk, gv
    "wkv4": Operator(
        wkv4,
        "w u k v state",
        _draw4,
        checks=[(3, 37, 29), (2, 301, 67)],
        large=[(4, 301, 2050)],  # several channels a thread, and in one stretch several tiles that hand on their states
        streams={"fp32": (12, 20), "bf16": (6, 10)},
    ),
    # r, w, k, v, a, b and y; these and their gradients; w, a and b are float32
    "wkv7": Operator(
        wkv7,
        "r w k v a b state",
        _draw7,
        checks=[(2, 37, 21), (2, 131, 128)],
        large=[(2, 131, 4096), (8, 131, 4096)],  # 1 << 13 and 1 << 15 lanes x channels: several rows a thread
        streams={"fp32": (28, 52), "bf16": (20, 38)},
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
    quiet_transformers()
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
        rng = torch.Generator(device).manual_seed(seed)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        how = {"generator": rng, "dtype": wide, "device": device}
        normal, share = (partial(draw, **how) for draw in (torch.randn, torch.rand))
        inputs = OPERATORS[operator].draw(shape, dtype, normal, share)
        reset = share(shape[:2]) < 0.05 if resets else None
        y, state = inputs[2], inputs[-1]  # of their shapes
        arriving = normal(*y.shape).to(dtype), normal(*state.shape)
        return cls(operator, tuple(x.requires_grad_() for x in inputs), reset, arriving)

    def results(self, run: Run) -> dict[str, Tensor]:
        """Both results, and the gradients of all inputs."""
        out = run(*self.inputs, self.reset)
        slopes = torch.autograd.grad(out, self.inputs, self.arriving_as(out))
        names = ("y", "state", *(f"gradient of {name}" for name in OPERATORS[self.operator].inputs.split()))
        return dict(zip(names, (*out, *slopes), strict=True))

    def arriving_as(self, out: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [g.to(o.dtype) for g, o in zip(self.arriving, out, strict=True)]

    def double(self, device: str) -> "Case":
        """The same numbers in float64."""
        inputs = tuple(x.detach().to(device, torch.float64).requires_grad_() for x in self.inputs)
        reset = None if self.reset is None else self.reset.to(device)
        return Case(self.operator, inputs, reset, tuple(g.to(device, torch.float64) for g in self.arriving))


def check(operator: str, backend: Backend, dtype: str, device: str) -> Agreement:
    """The worst disagreement with the specification in float64: odd sizes, carried state, all gradients, resets.

    The specification runs on the CPU for small sizes and on the device for large ones.
    """
    verdicts, of = [], OPERATORS[operator]
    places = [(shape, "cpu") for shape in of.checks] + [(shape, device) for shape in of.large if device == "cuda"]
    for shape, place in places:
        for resets in sorted({False, backend.resets}):
            case, expected = expected_results(operator, shape, dtype, device, resets, place)
            verdict = agreement(lambda case=case: case.results(backend.run), expected, ALLOWED[dtype])
            at = f"{'x'.join(map(str, shape))}{' with resets' * resets}"
            verdicts.append(replace(verdict, where=f"{verdict.where} at {at}"))
    return max(verdicts, key=lambda a: a.error)


@lru_cache(maxsize=8)
def expected_results(
    operator: str, shape: tuple[int, int, int], dtype: str, device: str, resets: bool, place: str
) -> tuple[Case, dict[str, Tensor]]:
    """Inputs on a device, and what the specification makes of them in float64, computed at a place."""
    case = Case.draw(operator, shape, DTYPES[dtype], device, resets)
    return case, case.double(place).results(OPERATORS[operator].backend("reference"))


@contextmanager
def launches() -> Iterator[list[str]]:
    """Inside, the CUDA kernels of ours that are launched, each once: what they are built for, and the names."""
    found: list[str] = []
    launch = build_cuda._launch

    def noted(name, variant, device, blocks, block, arguments):
        built = (DTYPE_NAMES.get(x, x) for x in variant)
        about = " ".join(f"{field}={x}" for field, x in zip(variant._fields, built, strict=True))
        kernel = f"{variant.source.stem} {about} {block[0]}x{block[1]}: {name}"
        if kernel not in found:
            found.append(kernel)
        launch(name, variant, device, blocks, block, arguments)

    build_cuda._launch = noted
    try:
        yield found
    finally:
        build_cuda._launch = launch
