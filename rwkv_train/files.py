"""Writing so that a crash leaves the old file or the new one, complete."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def temporary_beside(target: Path) -> Path:
    """A new name in target's directory, so that renaming it to target is one step."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def replace_file(target: Path, write: Callable[[Path], object]) -> None:
    """write(PATH), then put that file in target's place: a crash leaves the old or the new one, complete."""
    temporary = temporary_beside(target)
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # elsewhere a directory cannot be opened
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
