"""The CUDA kernels: built by NVRTC when an operator asks for its own, kept in the user's cache, launched by cuda.core.

Nobody needs a CUDA toolkit: NVRTC comes with torch's CUDA wheels, cuda.core is a package (`rwkv_train[cuda]`), and
the source includes none of CUDA's headers. Importing this only declares the operators; `available` decides for
backend "auto". All launches are on torch's current stream and nothing waits for the device, so that CUDA graphs can
record a call once one like it has run and so loaded the kernels.
"""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.ops import cache

NATIVE = Path(__file__).parent / "native"
HEADERS = tuple(
    NATIVE / name for name in ("gpu.h", "elementwise_gpu.h", "wkv4.h", "wkv4_gpu.h", "wkv7.h", "wkv7_gpu.h")
)
# Fast: exponentials and divisions of about 2 ulp, numbers below 1e-38 are 0. None of it touches double precision.
OPTIONS = {"std": "c++17", "use_fast_math": True, "restrict": True, "diag_suppress": 177}
TYPES = {torch.bfloat16: "Bf16", torch.float16: "Half", torch.float32: "float", torch.float64: "double"}

# Of an operator, the variants that it launches for a dtype. Each operator's module enters its own. WKV-7 also has
# variants for rare head sizes, which are built when they come.
VARIANTS: dict[str, Callable[[torch.dtype], Iterable]] = {}

library = torch.library.Library("rwkv_train", "DEF")


def available(operator: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an operator's kernels for a dtype are there or can be built; the first time not, one line says why."""
    reason = why_not(operator, device, dtype)
    if reason:
        cache.say_once(f"{reason} Until then torch does their work, many times slower.")
    return not reason


# torch.compile calls it while tracing, and takes the answer for a constant. The decorator that is made for this,
# torch.compiler.assume_constant_result, would import the whole compiler here.
available._dynamo_marked_constant = True


def why_not(operator: str, device: torch.device, dtype: torch.dtype) -> str:
    """Empty, or one line: what is missing and what to do. Builds and loads all that the operator would launch."""
    return _why_not(operator, torch.cuda.current_device() if device.index is None else device.index, dtype)


@functools.cache
def _why_not(operator: str, index: int, dtype: torch.dtype) -> str:
    try:
        for variant in VARIANTS[operator](dtype):
            _program(variant, _arch(index))
            _load(variant, index)
    except ImportError as error:
        return f"the CUDA kernels need {error.name}: pip install 'rwkv_train[cuda]'."
    except Exception as error:  # of NVRTC's loader, of NVRTC, of the driver: whatever it is, torch can do the work
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error" in line), lines[0])
        what = f"the CUDA kernels of {operator} could not be built or loaded"
        return f"{what} ({reason}). Update cuda-core, nvidia-cuda-nvrtc and the GPU's driver."
    return ""


def _load(variant, index: int) -> None:
    """Bring a variant's kernels to a device: a driver that is too old for them shows itself here."""
    with torch.cuda.device(index):
        _enter(index)
        for name in variant.kernels:
            _kernel(name, variant, index)


def _arch(index: int) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))


def _enter(index: int):
    """The device as cuda.core has it, in torch's context, which a new thread may not have yet."""
    from cuda.core import Device

    here = Device(index)
    here.set_current()
    return here


def build(variant, arch: str, logs=None) -> bytes:
    """The cubin for an architecture like "sm_90"; no GPU is needed. `logs.write` receives what the compiler says."""
    from cuda.core import Program, ProgramOptions

    source, options = variant.source, {**OPTIONS, "define_macro": variant.macros}
    options["include_path"] = str(HEADERS[0].parent)
    if logs is not None:
        options["ptxas_options"] = "-v"
    program = Program(source.read_text(encoding="utf-8"), "c++", ProgramOptions(name=source.name, arch=arch, **options))
    return bytes(program.compile("cubin", logs=logs).code)


@functools.cache
def _program(variant, arch: str):
    """The kernels as a cuda.core ObjectCode, from the cache or built now."""
    from cuda.bindings import nvrtc
    from cuda.core import ObjectCode

    parts = [path.read_bytes() for path in (variant.source, *HEADERS)] + [
        repr((OPTIONS, nvrtc.nvrtcVersion())).encode()
    ]
    stem = f"{variant.source.stem}-{arch}-{'-'.join(map(str, variant))}-{cache.key(*parts)}"
    kept = next(cache.find(stem, ".cubin"), None)
    if kept is not None:
        return ObjectCode.from_cubin(kept.read_bytes())
    cache.say_once("building CUDA kernels (once, a few seconds) ...")
    binary = build(variant, arch)
    cache.remember(stem, ".cubin", binary)
    return ObjectCode.from_cubin(binary)


@functools.cache
def _kernel(name: str, variant, index: int):
    return _program(variant, _arch(index)).get_kernel(name)


def _launch(name, variant, device: torch.device, blocks: int, block: tuple[int, int], arguments: list) -> None:
    """Queue a kernel; its arguments are addresses, sizes and floats, all of 64 bits."""
    from cuda.core import LaunchConfig, launch

    with torch.cuda.device(device):
        stream = _enter(device.index).create_stream(torch.cuda.current_stream())  # the same one, wrapped
        launch(stream, LaunchConfig(grid=blocks, block=block), _kernel(name, variant, device.index), *arguments)


def call(name: str, variant, blocks: int, block: tuple[int, int], sizes, tensors) -> None:
    """Queue a kernel of a variant on contiguous tensors, None for what is not there; nothing for no blocks."""
    pointers = (0 if x is None else x.data_ptr() for x in tensors)
    if blocks:
        _launch(name, variant, tensors[0].device, blocks, block, [*sizes, *pointers])


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def refuse(operator: str):
    """The gradient of a gradient."""

    def backward(ctx, *gradients):
        raise RuntimeError(f"{operator}: the CUDA kernels can be differentiated once, not twice")

    return backward
