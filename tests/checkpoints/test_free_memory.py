"""Opening a model takes the memory of the model; where there is less, that is said before anything is read."""

import re
from pathlib import Path

import pytest
import torch
from helpers import random_model

from rwkv_train import load_model, save_model
from rwkv_train.checkpoints import free_memory, modelfile


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much of files is in memory")
@pytest.mark.parametrize("name", ["m.pth", "m.safetensors", "folder"])
def test_no_more_than_a_piece_of_the_file_is_in_memory(tmp_path, name, monkeypatch):
    model = random_model(n_embd=128, vocab_size=30_000, generation="rwkv7", dtype=torch.bfloat16)
    save_model(model, tmp_path / name)
    load_model(tmp_path / name)  # which imports what it needs
    seen, size, drop = [], sum(p.nbytes for p in model.parameters()), modelfile.drop_pages

    def watched(t):
        seen.append(of_files())
        drop(t)

    monkeypatch.setattr(modelfile, "drop_pages", watched)
    monkeypatch.setattr(modelfile, "PIECE", 2**20)
    for dtype in (None, torch.float32):
        before = of_files()
        found = load_model(tmp_path / name, dtype)
        assert all(torch.equal(p, found.state_dict()[n].bfloat16()) for n, p in model.state_dict().items())
        assert max(seen) - before < size // 3
    monkeypatch.setattr(modelfile, "drop_pages", lambda t: seen.append(of_files()))
    load_model(tmp_path / name)
    assert max(seen) - before > size // 2  # as it would be


def of_files() -> int:
    """Bytes of mapped files that are in this process's memory."""
    return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def test_a_pickle_of_before_is_freed_on_the_way(tmp_path):
    model = random_model(vocab_size=99)
    torch.save(model.state_dict(), tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    found = modelfile.read_model(tmp_path / "m.pth")
    shapes = {name: p.shape for name, p in model.state_dict().items()}
    assert not found.mapped and modelfile._load(found, shapes, torch.float32, "cpu").keys() == shapes.keys()
    assert not found.tensors


def test_what_does_not_fit_is_not_read(tmp_path, monkeypatch):
    save_model(random_model(), tmp_path / "m.pth", dtype=torch.bfloat16)
    numbers = sum(p.numel() for p in random_model().parameters())
    monkeypatch.setattr(free_memory, "free_memory", lambda: 3 * numbers)
    monkeypatch.setattr(modelfile, "_load", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=r"m\.pth does not fit: as float32 it needs .* GB, and .* GB .*--dtype bf16"):
        load_model(tmp_path / "m.pth", torch.float32)
    monkeypatch.undo()
    monkeypatch.setattr(free_memory, "free_memory", lambda: None)  # where nobody says
    load_model(tmp_path / "m.pth")


def system(root, meminfo="MemTotal: 9000 kB\nMemAvailable: 1000 kB\nSwapFree: 24 kB\n", **files):
    """A file system that says so; "__" stands for "/"."""
    for name, text in {"proc__meminfo": meminfo, **files}.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_free_memory_is_the_machines_within_its_limits(tmp_path):
    assert free_memory.free_memory(system(tmp_path)) == 1024 * 1024
    group = "sys__fs__cgroup__box__inner__memory."
    stat = {f"{group}stat": "anon 5\ninactive_file 1000\nactive_file 24\n"}
    inner = {f"{group}max": "max\n", f"{group}current": "99\n"} | stat
    outer = {"sys__fs__cgroup__box__memory.max": "6500\n", "sys__fs__cgroup__box__memory.current": "5000\n"}
    system(tmp_path, proc__self__cgroup="0::/box/inner\n", **inner, **outer)
    assert free_memory.free_memory(tmp_path) == 1500
    system(tmp_path, **{f"{group}max": "300\n"})
    assert free_memory.free_memory(tmp_path) == 300 - 99 + 1024
    assert free_memory.free_memory(tmp_path / "nowhere") is None


def test_free_memory_in_a_group_of_the_first_version(tmp_path):
    limit = {f"sys__fs__cgroup__memory__memory.{k}_in_bytes": v for k, v in (("limit", "8000"), ("usage", "7000"))}
    system(tmp_path, proc__self__cgroup="9:cpu:/\n4:memory:/gone/in/here\n", **limit)
    assert free_memory.free_memory(tmp_path) == 1000
