"""Compiled kernels in the user's cache. A file's name ends in its digest, for half a library could kill Python."""

import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def folder() -> Path:
    try:
        import platformdirs
    except ImportError:  # `bench gpu` runs where only torch is
        return Path.home() / ".cache" / "rwkv_train"
    return Path(platformdirs.user_cache_dir("rwkv_train"))


def key(*parts: bytes) -> str:
    """A short name for all that a compiled kernel depends on."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def find(stem: str, suffix: str) -> Iterator[Path]:
    """The files kept under this name that are whole."""
    for path in folder().glob(f"{stem}-*{suffix}"):
        if path.stem == f"{stem}-{key(path.read_bytes())}":
            yield path


def keep(stem: str, suffix: str, build: Callable[[Path], None]) -> Path:
    """Have a file built under a name of our own, then rename it: other processes may be doing the same now."""
    folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder()) as own:
        built = Path(own) / f"kernel{suffix}"
        build(built)
        path = folder() / f"{stem}-{key(built.read_bytes())}{suffix}"
        os.replace(built, path)
    return path


@functools.cache
def say_once(text: str) -> None:
    print(f"rwkv_train: {text}", file=sys.stderr, flush=True)
