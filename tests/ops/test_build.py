"""Building the C++ kernels: once, kept, told of where it fails, and then done without."""

from concurrent.futures import ThreadPoolExecutor

import platformdirs
import pytest
import torch
from test_wkv4 import draw, needs_compiler

from rwkv_train.ops import build_cpu, cache
from rwkv_train.ops.wkv4 import wkv4


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The kernel as on a machine that has never built it; yields the cache folder."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    monkeypatch.setattr(build_cpu, "FLAGS", ("-O0", "-std=c++17", "-shared", "-fPIC", "-pthread"))  # builds faster
    for cached in (build_cpu.load, cache.say_once):
        cached.cache_clear()
    yield tmp_path / "rwkv_train"
    for cached in (build_cpu.load, cache.say_once):
        cached.cache_clear()


def test_without_a_compiler(fresh, monkeypatch, capsys):
    monkeypatch.setattr(build_cpu.shutil, "which", lambda name: None)
    args = [x.float() for x in draw(1, 5, 3)]
    for _ in range(2):
        y, _ = wkv4(*args)
    assert torch.equal(y, wkv4(*args, backend="torch")[0])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "no C++ compiler found" in lines[0] and "apt install g++" in lines[0]
    with pytest.raises(RuntimeError, match=r'backend "cpu" is not available: no C\+\+ compiler found'):
        wkv4(*args, backend="cpu")
    assert not fresh.exists()


@needs_compiler
def test_a_build_that_fails(fresh, monkeypatch, tmp_path, capsys):
    broken = tmp_path / "broken.cpp"
    broken.write_text("int f() { return undeclared_name; }\n")
    monkeypatch.setattr(build_cpu, "SOURCES", (broken,))
    assert not build_cpu.available() and not build_cpu.available()
    building, failed = capsys.readouterr().err.splitlines()
    assert "building the CPU kernel" in building
    assert "undeclared_name" in failed and "Install a current g++ or clang++" in failed


@needs_compiler
def test_a_cache_that_cannot_be_written(fresh, capsys):
    fresh.write_text("a file where the folder should be")
    assert build_cpu.available()
    building, kept = capsys.readouterr().err.splitlines()
    assert "building the CPU kernel" in building
    assert f"{fresh} cannot be written" in kept and "every start builds the kernels again" in kept


@needs_compiler
def test_builds_once_and_rebuilds_what_is_broken(fresh, capsys):
    args = draw(1, 5, 3)
    want = wkv4(*args, backend="reference")[0]
    for builds in (1, 0, 1):
        if builds == 1 and fresh.exists():
            (path,) = fresh.iterdir()
            half = path.read_bytes()[: path.stat().st_size // 2]
            path.unlink()  # the library is loaded: leave its file alone, put another in its place
            path.write_bytes(half)
        build_cpu.load.cache_clear()
        torch.testing.assert_close(wkv4(*args, backend="cpu")[0], want)
        assert capsys.readouterr().err.count("building the CPU kernel") == builds


@needs_compiler
def test_two_builds_at_once(fresh, capsys):
    with ThreadPoolExecutor(2) as pool:
        builds = [pool.submit(build_cpu.load.__wrapped__) for _ in range(2)]
    assert all(library is not None for library, _ in (build.result() for build in builds))
    assert [path.suffix for path in fresh.iterdir()] == [".so"]
