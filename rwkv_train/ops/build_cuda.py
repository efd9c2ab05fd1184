"""The CUDA kernels: built by NVRTC at first use, kept in the user's cache, launched through cuda.core.

Nobody needs a CUDA toolkit: NVRTC comes with torch's CUDA wheels, cuda.core is a package (`rwkv_train[cuda]`), and
the source includes none of CUDA's headers. Importing this only declares the operators; `available` decides for
backend "auto". All launches are on torch's current stream and nothing waits for the device, so that CUDA graphs can
record a call once one like it has run and so loaded the kernels.
"""

import functools
import sys
from pathlib import Path

import torch
from torch import Tensor

from rwkv_train.ops import cache

NATIVE = Path(__file__).parent / "native"
HEADERS = tuple(NATIVE / name for name in ("gpu.h", "wkv4.h", "wkv4_gpu.h", "wkv7.h"))
# Fast: exponentials and divisions of about 2 ulp, numbers below 1e-38 are 0. None of it touches double precision.
OPTIONS = {"std": "c++17", "use_fast_math": True, "restrict": True, "diag_suppress": 177}
TYPES = {torch.bfloat16: "Bf16", torch.float16: "Half", torch.float32: "float", torch.float64: "double"}

library = torch.library.Library("rwkv_train", "DEF")


def available(device: torch.device) -> bool:
    """Whether the kernels are there or can be built for a device; the first time they cannot, one line says why."""
    if why_not(device):
        cache.say_once(f"{why_not(device)} Until then WKV runs in torch, many times slower.")
    return not why_not(device)


# torch.compile calls it while tracing, and takes the answer for a constant. The decorator that is made for this,
# torch.compiler.assume_constant_result, would import the whole compiler here.
available._dynamo_marked_constant = True


def why_not(device: torch.device) -> str:
    """Empty, or one line: what is missing and what to do."""
    return _why_not(torch.cuda.get_device_capability(device))


@functools.cache
def _why_not(capability: tuple[int, int]) -> str:
    from rwkv_train.ops.wkv4_cuda import Variant  # a kernel to try; it imports this module

    try:
        _program(Variant(False, torch.float32, 1), _arch(capability))
    except ImportError as error:
        return f"the CUDA kernels need {error.name}: pip install 'rwkv_train[cuda]'."
    except OSError as error:
        return f"the CUDA kernels could not be kept ({error}). Make {cache.folder()} writable."
    except Exception as error:  # of NVRTC's loader, of NVRTC, of the driver: whatever it is, torch can do the work
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error" in line), lines[0])
        return f"the CUDA kernels could not be built ({reason}). Update cuda-core and nvidia-cuda-nvrtc."
    return ""


def _arch(capability: tuple[int, int]) -> str:
    return "sm_{}{}".format(*capability)


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
    path = next(cache.find(stem, ".cubin"), None)
    if path is None:
        print("rwkv_train: building CUDA kernels (once, a few seconds) ...", file=sys.stderr, flush=True)
        path = cache.keep(stem, ".cubin", lambda path: path.write_bytes(build(variant, arch)))
    return ObjectCode.from_cubin(path.read_bytes())


@functools.cache
def _kernel(name: str, variant, index: int):
    return _program(variant, _arch(torch.cuda.get_device_capability(index))).get_kernel(name)


def _launch(name, variant, device: torch.device, blocks: int, block: tuple[int, int], arguments: list[int]) -> None:
    """Queue a kernel; its arguments are addresses and sizes, all of 64 bits."""
    from cuda.core import Device, LaunchConfig, launch

    with torch.cuda.device(device):
        here = Device(device.index)
        here.set_current()  # torch's context; a new thread may not have it yet
        stream = here.create_stream(torch.cuda.current_stream())  # the same one, wrapped
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
