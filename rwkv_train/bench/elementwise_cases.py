"""What lies between matrix products, on a device, against the same in float64 by torch alone on the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_train.bench.measure import DTYPES, Agreement, agreement
from rwkv_train.ops import build_cpu, elementwise, elementwise7

ALLOWED = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 2e-3, "autocast": 1e-2}  # relative error of each result and gradient
KINDS = tuple(ALLOWED)  # autocast: float32 sequences where matrix products are done in bfloat16
SIZES = [(2, 37, 3, 20), (2, 131, 6, 64)]  # B, T, H, N: odd, and several tiles of any kernel
LARGE = [(4, 301, 32, 64)]  # on a GPU, too: where size may pick other kernels


class More(NamedTuple):
    """What an operation takes that has no gradient: reset [B,T], targets [B * T], the number of heads."""

    reset: Tensor
    targets: Tensor
    n_head: int


@dataclass(frozen=True)
class Operation:
    """inputs: the axes of each; what has three is stored in the dtype that is checked, and all others in float32.

    differentiable: gradients of all inputs are compared, too.
    """

    inputs: str
    run: Callable[[list[Tensor], More], tuple[Tensor, ...]]
    differentiable: bool = True


def _cross_entropy(inputs: list[Tensor], more: More) -> tuple[Tensor, Tensor]:
    logits = inputs[0].flatten(0, 1).clone()
    return elementwise.cross_entropy_(logits, more.targets, 1e-3), logits


CASES = {
    "token_shift_mix": Operation(
        "BTC BC C C C C C C", lambda x, m: elementwise.token_shift_mix(*x[:2], m.reset, *x[2:])
    ),
    "squared_relu": Operation("BTC", lambda x, m: (elementwise.squared_relu(*x),)),
    "gate": Operation("BTC BTC", lambda x, m: (elementwise.gate(*x),)),
    "cross_entropy_": Operation("BTC", _cross_entropy, differentiable=False),
    "decay": Operation("BTC C", lambda x, m: (elementwise7.decay(*x),)),
    "value_residual": Operation("BTC BTC BTC C", lambda x, m: (elementwise7.value_residual(*x),)),
    "keys": Operation("BTC BTC C C C", lambda x, m: elementwise7.keys(*x, m.n_head)),
    "head_output": Operation("BTC BTC BTC BTC BTC HN C C", lambda x, m: (elementwise7.head_output(*x),)),
}


def check(name: str, kind: str, device: str) -> Agreement:
    """The worst disagreement of results and gradients, of all sizes."""
    verdicts, operation = [], CASES[name]
    for size in SIZES + LARGE * (device == "cuda"):
        inputs, more = _draw(operation.inputs.split(), size, DTYPES.get(kind, torch.float32))
        with _torch_alone():
            expected = _results(operation, [x.double() for x in inputs], more)
        there = [x.to(device) for x in inputs], More(more.reset.to(device), more.targets.to(device), more.n_head)

        def run(there=there) -> dict[str, Tensor]:
            with torch.autocast(device, torch.bfloat16, enabled=kind == "autocast"):
                return _results(operation, *there)

        verdict = agreement(run, expected, ALLOWED[kind])
        verdicts.append(replace(verdict, where=f"{verdict.where} at {'x'.join(map(str, size))}"))
    return max(verdicts, key=lambda verdict: verdict.error)


def run_small(name: str, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """One call, forward and backward."""
    inputs, (reset, targets, n_head) = _draw(CASES[name].inputs.split(), SIZES[-1], dtype)
    return _results(CASES[name], [x.to(device) for x in inputs], More(reset.to(device), targets.to(device), n_head))


def _draw(inputs: list[str], size: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], More]:
    B, T, H, N = size
    lengths, rng = {"B": B, "T": T, "C": H * N, "H": H, "N": N}, torch.Generator().manual_seed(0)
    normal = [torch.randn([lengths[axis] for axis in axes], generator=rng) for axes in inputs]
    reset, targets = torch.rand(B, T, generator=rng) < 0.05, torch.randint(H * N, (B * T,), generator=rng)
    targets[::7] = elementwise.IGNORE_INDEX
    return [x.to(dtype) if x.ndim == 3 else x for x in normal], More(reset, targets, H)


def _results(operation: Operation, inputs: list[Tensor], more: More) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_(operation.differentiable) for x in inputs]
    out, rng = operation.run(leaves, more), torch.Generator().manual_seed(1)
    found = {f"result {i}": y for i, y in enumerate(out)}
    if operation.differentiable:
        arriving = [torch.randn(y.shape, generator=rng).to(y.device, y.dtype) for y in out]
        found |= {f"gradient {i}": g for i, g in enumerate(torch.autograd.grad(out, leaves, arriving))}
    return found


@contextmanager
def _torch_alone() -> Iterator[None]:
    """Inside, the CPU's kernels are not there."""
    usual = build_cpu.available
    build_cpu.available = lambda: False
    try:
        yield
    finally:
        build_cpu.available = usual
