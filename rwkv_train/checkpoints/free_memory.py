"""Whether a model has room in memory, said before it is read."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch

GB = 2**30


def check_fits(source: Path, numbers: int, dtype: torch.dtype, device: str | torch.device) -> None:
    """ValueError where so many weights of a dtype are more than is free on a device, as far as that is known."""
    device = torch.device(device)
    needed, free = numbers * dtype.itemsize, free_on_gpu(device) if device.type == "cuda" else free_memory()
    if free is None or needed <= free:
        return
    name = str(dtype).removeprefix("torch.")
    remedies = ["a smaller model", "an end of what else runs there"]
    remedies[:0] = ["--dtype bf16 (half of it; not for training)"] * (dtype.itemsize > 2) + ["--device cpu"] * (
        device.type == "cuda"
    )
    raise ValueError(
        f"{source} does not fit: as {name} it needs {needed / GB:.2f} GB, and {free / GB:.2f} GB of {device} memory are"
        f" free; what helps: {', '.join(remedies)}"
    )


def free_on_gpu(device: torch.device) -> int:
    """Bytes of a GPU that nobody holds, or that torch holds and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still have, swap included: what the machine has, within limits set on its control
    groups (as containers do). None where there is no Linux to say. root: of the file system that says it."""
    meminfo = _numbers(root / "proc/meminfo")
    if "MemAvailable" not in meminfo:
        return None
    return min([(meminfo["MemAvailable"] + meminfo.get("SwapFree", 0)) * 1024, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """What is left below each limit of this process's control groups, v2's and v1's; files in memory make way."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        mount = root / "sys/fs/cgroup" / kinds
        limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        inside = mount / path.strip("/")
        for folder in (inside, *inside.parents):
            if not folder.is_relative_to(mount):
                break
            most, now = _text(folder / limit), _text(folder / used)
            if most.isdecimal() and now.isdecimal():  # not "max"
                stat = _numbers(folder / "memory.stat")
                yield int(most) - int(now) + stat.get("inactive_file", 0) + stat.get("active_file", 0)


def _numbers(file: Path) -> dict[str, int]:
    """The first number on each line of a file, by the word before it."""
    return {word: int(number) for word, number in re.findall(r"^(\w+):?\s+(\d+)", _text(file), re.MULTILINE)}


def _text(file: Path) -> str:
    """What a file says, "" where there is none."""
    return file.read_text().strip() if file.is_file() else ""
