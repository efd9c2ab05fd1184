"""CUDA kernels run on the CPU: wkv_host.h is compiled with a kernel's source and takes the place of a GPU."""

import ctypes
import functools
import io
import os
import re
import shutil
import struct
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rwkv_train.ops import build_cuda, elementwise7_cuda, wkv4_cuda, wkv7_cuda

HOST = Path(__file__).with_name("wkv_host.h")
has_cuda_core = find_spec("cuda") is not None and find_spec("cuda.core") is not None
needs_cuda_core = pytest.mark.skipif(not has_cuda_core, reason="cuda-core is for Linux and Windows")
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="kernels run on the CPU by g++ and ucontext"
)
_cpu = torch.library.Library("rwkv_train", "IMPL")
for _name, _module in (("wkv4", wkv4_cuda), ("wkv7", wkv7_cuda)):
    _cpu.impl(_name, _module._forward, "CPU")
    _cpu.impl(f"{_name}_backward", _module._backward, "CPU")
for _name, _run in elementwise7_cuda.IMPLEMENTATIONS.items():  # of both
    _cpu.impl(_name, _run, "CPU")


@functools.cache
def library(folder: Path, variant) -> ctypes.CDLL:
    """Built once in a folder; another process may build the same beside this one."""
    built = folder / f"{'-'.join(map(str, (variant.source.stem, *variant)))}.so"
    if built.exists():
        return ctypes.CDLL(str(built))
    source, mine = (built.with_suffix(f".{os.getpid()}{suffix}") for suffix in (".cpp", ".so"))
    macros = [f"#define {m if isinstance(m, str) else ' '.join(m)}\n" for m in variant.macros]
    defined = [f"HOST_KERNEL({name})\n" for name in variant.kernels]
    source.write_text("".join(macros) + f'#include "{HOST}"\n#include "{variant.source}"\n' + "".join(defined))
    flags = ("-O1", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror")
    done = subprocess.run(["g++", *flags, "-o", mine, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mine.rename(built)
    return ctypes.CDLL(str(built))


def launcher(folder: Path, how: dict):
    """What takes the place of `build_cuda._launch`.

    how: "descending" turns the order of the threads round; "launched" lists the kernels.
    """

    def launch(name, variant, device, blocks, block, arguments):
        assert {type(x) for x in arguments} <= {int, float}, "of cuda.core's arguments only these have 64 bits"
        kernel = getattr(library(folder, variant), f"host_{name}")
        bits = [struct.unpack("q", struct.pack("d", x))[0] if isinstance(x, float) else x for x in arguments]
        numbers = (ctypes.c_int64 * len(bits))(*bits)
        kernel(ctypes.c_int(blocks), *map(ctypes.c_int, block), ctypes.c_bool(how["descending"]), numbers)
        how["launched"].append(name)

    return launch


@contextmanager
def cuda_autocast(dtype: torch.dtype = torch.bfloat16):
    """torch.autocast("cuda"), which torch switches off where no GPU is, for tensors that are fake."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), torch.is_autocast_cache_enabled()

    def put(enabled, dtype, cache):
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)
        torch.set_autocast_cache_enabled(cache)

    put(True, dtype, False)  # the cache holds on to tensors through CUDA's own code
    try:
        yield
    finally:
        put(*before)


def check_compiles(variant, arch: str) -> None:
    """For a GPU that is not here, with everything in registers."""
    logs = io.StringIO()
    assert build_cuda.build(variant, arch, logs)[:4] == b"\x7fELF"
    names = re.findall(r"Compiling entry function '(\w+)'", logs.getvalue())
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", logs.getvalue())
    assert sorted(names) == sorted(variant.kernels) and len(spills) == len(names)
    assert set(spills) == {("0", "0")}, f"{variant}: {logs.getvalue()}"
