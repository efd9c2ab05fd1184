"""Compiled kernels in the user's cache. A file's name ends in its digest, for half a library could kill Python."""

import atexit
import contextlib
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
        return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "rwkv_train"
    return Path(platformdirs.user_cache_dir("rwkv_train"))


def key(*parts: bytes) -> str:
    """A short name for all that a compiled kernel depends on."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def find(stem: str, suffix: str) -> Iterator[Path]:
    """The files kept under this name that are whole."""
    for path in folder().glob(f"{stem}-*{suffix}"):
        with contextlib.suppress(OSError):
            if path.stem == f"{stem}-{key(path.read_bytes())}":
                yield path


def keep(stem: str, suffix: str, build: Callable[[Path], None]) -> Path:
    """Have a file built and kept. Where the cache cannot be written it is this process's own, gone when it ends."""
    built = Path(tempfile.mkdtemp(dir=_own_folder())) / f"{stem}{suffix}"
    build(built)
    return remember(stem, suffix, built.read_bytes()) or built


def remember(stem: str, suffix: str, content: bytes) -> Path | None:
    """Keep a file for the next start, under a name of our own that is changed at the end: other processes may be doing
    the same now. None where that cannot be done, which is told once."""
    path = folder() / f"{stem}-{key(content)}{suffix}"
    try:
        if folder().parts[:1] == ("~",):
            raise OSError("no home folder is known")
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder()) as own:
            built = Path(own) / path.name
            built.write_bytes(content)
            os.replace(built, path)
    except OSError as error:
        say_once(f"{folder()} cannot be written ({error}), so every start builds the kernels again.")
        return None
    return path


@functools.cache
def _own_folder() -> str:
    made = tempfile.mkdtemp(prefix="rwkv_train-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@functools.cache
def say_once(text: str) -> None:
    print(f"rwkv_train: {text}", file=sys.stderr, flush=True)
