"""Which implementation of an operator runs."""

from collections.abc import Callable, Mapping

import torch

from rwkv_train.ops import build_cpu, build_cuda

PLACES = {"cpu": ("cpu", "the CPU"), "cuda": ("cuda", "a CUDA device"), "fla": ("cuda", "a CUDA device")}


def pick(
    operator: str, backends: Mapping[str, Callable], backend: str, device: torch.device, dtype: torch.dtype
) -> Callable:
    """The implementation behind a backend's name.

    backends: one for each name that the operator has. dtype: in which a CUDA kernel would read the long inputs.
    "auto" is the kernel for the device if it can be built, otherwise "torch". ValueError for an unknown name or the
    wrong device, RuntimeError for a CUDA kernel that cannot be built; that of the CPU sees to it itself.
    """
    asked = (operator, device, dtype)
    if backend == "auto":
        kernels = {"cpu": build_cpu.available, "cuda": lambda: build_cuda.available(*asked)}.get(device.type)
        backend = device.type if kernels and kernels() else "torch"
    if backend not in backends:
        names = ", ".join(f'"{name}"' for name in ("auto", *backends))
        raise ValueError(f"{operator}: unknown backend {backend!r}, expected one of {names}")
    needed, place = PLACES.get(backend, (device.type, ""))
    if device.type != needed:
        raise ValueError(f'{operator}: backend "{backend}" needs tensors on {place}, found {device}; use "auto"')
    if backend == "cuda" and not build_cuda.available(*asked):
        raise RuntimeError(f'{operator}: backend "cuda" is not available: {build_cuda.why_not(*asked)}')
    return backends[backend]
