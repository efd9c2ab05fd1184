"""The repository keeps its own promises: imports go one way, every config parses; test_docs.py has the rest."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_train import cli
from rwkv_train.config import FitConfig

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "rwkv_train").rglob("*.py"))

# Layers from the bottom up: a module may import from its own layer and those before it.
LAYERS = [
    [
        "__init__",
        "ops",
        "wkv",
        "tokenizer",
        "tokenizer_json",
        "config",
        "command_config",
        "files",
        "program",
        "run_config",
    ],
    ["models"],
    ["bptt", "generation", "generate", "evaluate", "checkpoints", "data"],
    ["train", "feedback", "plan"],
    ["chat"],
    ["serve", "bench"],
    ["commands", "cli"],
]
HEAVY = {
    **{"lightning": {"train"}, "deepspeed": {"train"}, "wandb": {"train"}, "datasets": {"data"}},
    **{"fastapi": {"serve"}, "starlette": {"serve"}, "uvicorn": {"serve"}, "llguidance": {"serve"}},
}


def imports(path: Path):
    """(top-level name, dotted name) of everything a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            continue
        yield from ((name.split(".")[0], name) for name in names)


def room(path: Path) -> str:
    """The module's or package's name below rwkv_train."""
    return path.relative_to(ROOT / "rwkv_train").parts[0].removesuffix(".py")


def layer(name: str) -> int:
    (found,) = [i for i, names in enumerate(LAYERS) if name in names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    for top, name in imports(path):
        if top == "rwkv_train" and room(path) != "__init__":
            imported = [*name.split("."), "__init__"][1]
            assert layer(imported) <= layer(room(path)), f"{path.name} imports {name}"
        assert room(path) in HEAVY.get(top, {room(path)}), f"{path.name} imports {top}"


def test_importing_is_light():
    """No heavy package comes with the command line, and none of the optional ones with the library."""
    settings = "rwkv_train.bench.settings, rwkv_train.serve.settings"
    light = f"rwkv_train.cli, rwkv_train.config, rwkv_train.data.prepare, {settings}"
    library = "rwkv_train.checkpoints.modelfile, rwkv_train.bptt, rwkv_train.generate"
    for names, banned in [
        (light, {"torch", "datasets", "lightning", "fastapi"}),
        (library, {"datasets", "lightning", "wandb"}),
    ]:
        code = f"import sys, {names}; print(*sys.modules)"
        loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
        assert not loaded & banned


def test_test_files_have_names_of_their_own():
    """Folders of tests are no packages: of two files of one name, only one is run."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_configs_parse_and_say_what_they_do(path, capsys):
    config, extra = cli.parse("fit", ["--config", str(path), "--resume"])
    assert isinstance(config, FitConfig) and extra == {"resume": "newest"}
    text = path.read_text(encoding="utf-8")
    assert f"train.py fit --config configs/{path.name}" in text.split("\n\n")[0].split("name:")[0]
    with pytest.raises(SystemExit) as stop:
        cli.parse("fit", ["--config", str(path), "--train.stepz=3"])
    assert stop.value.code == 2 and "stepz" in capsys.readouterr().err


def test_the_tree_names_every_room():
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in {room(path) for path in MODULES} - {"__init__"}:
        assert re.search(rf"^  {name}(/|\.py) ", tree, re.MULTILINE), f"the tree in CONTRIBUTING.md lacks {name}"


def test_what_lies_about_does_not_change_the_style(tmp_path):
    """A run's folder is no package of ours, and what is built or installed beside the tree is not judged."""
    for folder in ("runs/quickstart", "helpers", "data/book", "site/rwkv_train", "build/lib/rwkv_train", "tests"):
        (tmp_path / folder).mkdir(parents=True)
    imports = ["import os", "", "import pytest", "from helpers import run", "from runs import store_in", ""]
    used = ["from rwkv_train import cli", "", "print(os, pytest, run, store_in, cli)", ""]
    (tmp_path / "tests" / "test_a.py").write_text("\n".join(imports + used))
    for name in ("site/rwkv_train/a.py", "build/lib/rwkv_train/a.py", "runs/a.py", "data/a.py", "a.py"):
        (tmp_path / name).write_text("import sys,os")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_style():
    for check in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *check, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
