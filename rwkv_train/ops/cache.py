"""Compiled kernels in the user's cache. A file's name ends in its digest, for half a library could kill Python."""

import atexit
import functools
import hashlib
import os
import shutil
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
    """Have a file built under a name of our own, then rename it: other processes may be doing the same now.

    Where the cache cannot be written, the file is this process's own, and gone when it ends.
    """
    try:
        if folder().parts[:1] == ("~",):
            raise OSError("no home folder is known")
        folder().mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder()).close()
    except OSError as error:
        say_once(f"{folder()} cannot be written ({error}), so every start builds the kernels again.")
        path = Path(_own_folder()) / f"{stem}{suffix}"
        build(path)
        return path
    with tempfile.TemporaryDirectory(dir=folder()) as own:
        built = Path(own) / f"kernel{suffix}"
        build(built)
        path = folder() / f"{stem}-{key(built.read_bytes())}{suffix}"
        os.replace(built, path)
    return path


@functools.cache
def _own_folder() -> str:
    made = tempfile.mkdtemp(prefix="rwkv_train-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@functools.cache
def say_once(text: str) -> None:
    print(f"rwkv_train: {text}", file=sys.stderr, flush=True)
