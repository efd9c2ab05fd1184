"""The C++ kernels: built with the system's compiler at first use, kept in the user's cache, called by ctypes.

Nothing happens at import. `available` decides for backend "auto", and says why when the answer is no, once.
"""

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from rwkv_train.ops import cache

FOLDER = Path(__file__).parent / "native"
SOURCES = tuple(FOLDER / f"{name}_cpu.cpp" for name in ("wkv4", "wkv7", "elementwise", "elementwise7", "linear"))
HEADERS = tuple(
    FOLDER / name for name in ("jobs.h", "storage.h", "exp_log.h", "vectors.h", "wkv4.h", "wkv7.h", "wkv7_back.h")
)
# Of dtypes, at the ends of the functions' names.
NAMES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}
_RECORDS = threading.local()
COMPILERS = ("c++", "g++", "clang++")
# No -ffast-math: it would reorder the operations that split an exponent into an integer and a small rest.
FLAGS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-std=c++17", "-shared", "-fPIC", "-pthread"),
)


def available() -> bool:
    """Whether the kernel is there or can be built; the first time it is not, one line on stderr says why."""
    library, why_not = load()
    if library is None:
        cache.say_once(f"{why_not} Until then WKV runs in torch, about ten times slower.")
    return library is not None


def demand(operator: str) -> None:
    """Raise RuntimeError, with the reason, where the kernels cannot be had."""
    library, why_not = load()
    if library is None:
        raise RuntimeError(f'{operator}: backend "cpu" is not available: {why_not}')


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, from the cache or built now; or None and one line: what is missing and what to do."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None, (
            f"no C++ compiler found ({', '.join(COMPILERS)}). Install one: apt install g++ (Debian, Ubuntu), "
            "dnf install gcc-c++ (Fedora), xcode-select --install (macOS)."
        )
    try:
        stem = f"wkv-{_key(compiler)}"
        return _find(stem) or _build(compiler, stem), ""
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
        reason = lines[0] if lines else f"exit status {error.returncode}"
        return (
            None,
            f"{compiler} could not build the CPU kernel ({reason}). Install a current g++ or clang++.",
        )
    except OSError as error:
        return None, (
            f"the CPU kernel could not be built or loaded ({error}). Make {cache.folder()} writable, "
            "or set XDG_CACHE_HOME to a folder that is, and check that the C++ compiler fits this Python."
        )


def _key(compiler: str) -> str:
    """Whatever the machine code depends on: sources, flags, compiler, and the CPU as the compiler sees it."""
    # The predefined macros name the compiler's version and, under -march=native, every extension of this CPU.
    macros = _run(compiler, *FLAGS, "-x", "c++", "-dM", "-E", os.devnull)
    sources = [path.read_bytes() for path in SOURCES + HEADERS]
    return cache.key(*sources, " ".join(FLAGS).encode(), macros.encode())


def _find(stem: str) -> ctypes.CDLL | None:
    for path in cache.find(stem, ".so"):
        try:
            return _bind(path)
        except OSError:
            continue
    return None


def _build(compiler: str, stem: str) -> ctypes.CDLL:
    print("rwkv_train: building the CPU kernel (once, a few seconds) ...", file=sys.stderr, flush=True)
    return _bind(cache.keep(stem, ".so", lambda path: _run(compiler, *FLAGS, "-o", str(path), *map(str, SOURCES))))


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True).stdout


def _bind(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for operator in ("wkv4", "wkv7"):
        for direction in ("forward", "backward"):
            for dtype in NAMES.values():
                function = getattr(library, f"{operator}_{direction}_{dtype}")
                function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
                function.restype = None
    for dtype in ("f32", "bf16"):
        getattr(library, f"products_{dtype}").argtypes = (ctypes.c_char_p, ctypes.c_int64, ctypes.c_int)
    library.wkv_use_team.argtypes = (ctypes.c_void_p,)
    library.wkv_use_team(_team())
    return library


def _team() -> int | None:
    """The address of GOMP_parallel in the OpenMP library that torch has loaded, see jobs.h; None if there is none."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(errors="replace").splitlines() if maps.exists() else []
    libraries = {line.split()[-1] for line in lines if re.search(r"/lib(g|i)?omp[^/]*\.so[^/]*$", line)}
    for path in sorted(libraries, key=lambda path: f"{os.sep}torch" not in path):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def run(kernel: str, dtype: torch.dtype, inputs: ctypes.Structure, outputs: ctypes.Structure) -> None:
    """Call "wkv4_forward" and the like on structures of addresses, with as many threads as torch uses."""
    launch(f"{kernel}_{NAMES[dtype]}", ctypes.byref(inputs), ctypes.byref(outputs))


def launch(name: str, *arguments) -> None:
    """Call a kernel, whose last argument is how many threads there are: as many as torch uses."""
    function = getattr(load()[0], name)
    if record := getattr(_RECORDS, "record", None):
        record(function, arguments)
    function(*arguments, torch.get_num_threads())


@contextmanager
def recorded(record: Callable[[Callable, tuple], None]):
    """Within, `record` is told what this thread launches: the function and its arguments but the threads."""
    _RECORDS.record = record
    try:
        yield
    finally:
        _RECORDS.record = None


def address(x: torch.Tensor | None) -> int | None:
    """Of a contiguous tensor, which the caller keeps alive."""
    return None if x is None else x.data_ptr()
