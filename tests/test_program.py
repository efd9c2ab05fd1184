"""The program anywhere: hints that a shell takes, what comes along with the wheel, homes and folders of all kinds."""

import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import platformdirs
import pytest

from rwkv_train import cli, program

ROOT = Path(__file__).parent.parent
HI = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'


@pytest.fixture
def called(monkeypatch, tmp_path):
    """called(argv0): as if the program had been called by this, with a python and an rwkv-train on the PATH."""
    for file in ("python", "rwkv-train"):
        (tmp_path / file).write_text("")
        (tmp_path / file).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))

    def call(argv0, path=str(tmp_path)):
        monkeypatch.setenv("PATH", path)
        monkeypatch.setattr(sys, "argv", [argv0.replace("HERE", str(tmp_path))])
        return program.name(), program.command("fit", "--config", "my runs/a/config.yaml", "--resume")

    return call


def test_hints_name_the_program_as_it_was_called(called, tmp_path):
    rest = "fit --config 'my runs/a/config.yaml' --resume"
    assert called("train.py") == ("train.py", f"python train.py {rest}")
    assert called("../my clone/train.py") == ("train.py", f"python '../my clone/train.py' {rest}")
    assert called("train.py", path="") == ("train.py", f"{tmp_path}/python3 train.py {rest}")
    assert called("HERE/rwkv-train") == ("rwkv-train", f"rwkv-train {rest}")
    assert called("/else where/rwkv-train") == ("rwkv-train", f"'/else where/rwkv-train' {rest}")
    assert called("pytest") == ("train.py", f"python train.py {rest}")  # by something else, in this clone


def test_hints_where_nothing_is_cloned(called, monkeypatch, tmp_path):
    monkeypatch.setattr(program, "HERE", tmp_path / "site" / "rwkv_train")
    assert called("-c") == ("rwkv-train", "rwkv-train fit --config 'my runs/a/config.yaml' --resume")


def test_what_comes_along_is_found_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config, _ = cli.parse("fit", ["--config", "configs/quickstart.yaml"])
    assert config.name == "quickstart" and "taking the one that comes along" in capsys.readouterr().err
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "quickstart7.yaml", tmp_path / "configs" / "quickstart.yaml")
    assert cli.parse("fit", ["--config=configs/quickstart.yaml"])[0].name == "quickstart7"  # one's own goes first
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit):
        cli.parse("fit", ["--config", "configs/nothing.yaml"])
    assert "configs/nothing.yaml" in capsys.readouterr().err


WAITS = """
import os, sys
from rwkv_train import cli, program
program.others_run = lambda: os.environ["BESIDE"] == "others"
cli._find = lambda where: exit("torch came first" if "torch" in sys.modules else 0)
try:
    cli.main(["bench", "train"])
finally:
    print(*(os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")))
"""


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, "passive 300 None"),
        ({"BESIDE": "nobody"}, "None None None"),
        ({"OMP_WAIT_POLICY": "active"}, "active None None"),
        ({"GOMP_SPINCOUNT": "7"}, "None 7 None"),
        ({"KMP_BLOCKTIME": "0"}, "None None 0"),
    ],
)
def test_threads_sleep_beside_others_unless_the_user_says_otherwise(own, expected):
    """Set before a command's module, and torch with it, is imported."""
    inherited = {name: value for name, value in os.environ.items() if name not in program.CHOSEN}
    done = subprocess.run(
        [sys.executable, "-c", WAITS],
        env=inherited | {"BESIDE": "others"} | own,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="nobody counts what runs")
def test_another_busy_process_is_noticed():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            assert any(program.others_run() for _ in range(1000))
        finally:
            busy.kill()


def test_threads_that_are_there_already_are_left_alone(monkeypatch):
    monkeypatch.setattr(program, "others_run", lambda: True)
    for name in program.CHOSEN:
        monkeypatch.delenv(name, raising=False)
    program.let_threads_sleep()  # torch came with the tests
    assert not program.CHOSEN & os.environ.keys()


def test_the_wheel_works_without_the_clone_and_without_a_home(tmp_path):
    """Built from a copy, so that nothing is left in the clone; then run from elsewhere, as after `pip install`."""
    copy, site, elsewhere = tmp_path / "copy", tmp_path / "site", tmp_path / "else where"
    for name in ("rwkv_train", "configs", "data/starter"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    built = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(tmp_path / built.stdout.split()[-1]) as wheel:
        files = set(wheel.namelist())
        wheel.extractall(site)
    shipped = [p for p in (ROOT / "rwkv_train").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    shipped += [p for name in ("starter", "configs") for p in (ROOT / "rwkv_train" / name).iterdir()]
    assert {str(p.relative_to(ROOT)) for p in shipped} <= files
    elsewhere.mkdir()
    (elsewhere / "a b.jsonl").write_text(HI * 9)
    script = """
import io, sys
from rwkv_train.cli import main
def run(*argv):
    try:
        main(list(argv))
    except SystemExit as stop:
        print("code", stop.code)
run("prepare", "a b.jsonl", "--tokenizer=bytes", "--out=my store")
sys.stdin = io.StringIO("Hi\\n/state save a\\n")
run("chat", "--tokens=6", "--temperature=0")
"""
    cache = {"XDG_CACHE_HOME": platformdirs.user_cache_dir()}  # kernels take long to build
    home = {"HOME": "/proc/nohome", "XDG_DATA_HOME": "/proc/nohome"} | cache
    environment = os.environ | home | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    told = done.stdout + done.stderr
    assert done.stdout.count("code 0") == 2 and "Traceback" not in told, told
    (following,) = [line for line in done.stdout.splitlines() if line.startswith("Next: ")]
    assert following == "Next: rwkv-train fit --config configs/quickstart.yaml --data.path 'my store'"
    assert shlex.split(following)[-1] == "my store" and (elsewhere / "my store").is_dir()
    assert "saved 1 turns as a" in done.stdout and told.count("nothing can be kept in /proc/nohome") == 1
