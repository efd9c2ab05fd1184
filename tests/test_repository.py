"""The repository keeps its own promises: imports go one way, every config parses, every README command runs."""

import ast
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_toys import TOY
from helpers import random_model

from rwkv_train import cli, save_model
from rwkv_train.config import FitConfig
from rwkv_train.tokenizer import train_bpe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted((ROOT / "rwkv_train").rglob("*.py"))

# Layers from the bottom up: a module may import from its own layer and those before it.
LAYERS = [
    ["__init__", "ops", "wkv", "tokenizer", "config", "command_config", "files", "program", "run_config"],
    ["models"],
    ["bptt", "generate", "evaluate", "checkpoints", "data"],
    ["train", "feedback", "plan", "chat", "bench", "commands", "cli"],
]
HEAVY = {"lightning": {"train"}, "deepspeed": {"train"}, "wandb": {"train"}, "datasets": {"data"}}


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
    light = "rwkv_train.cli, rwkv_train.config, rwkv_train.data.prepare, rwkv_train.bench.settings"
    library = "rwkv_train.checkpoints.modelfile, rwkv_train.bptt, rwkv_train.generate"
    for names, banned in [(light, {"torch", "datasets", "lightning"}), (library, {"datasets", "lightning", "wandb"})]:
        code = f"import sys, {names}; print(*sys.modules)"
        loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
        assert not loaded & banned


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_configs_parse_and_say_what_they_do(path, capsys):
    config, extra = cli.parse("fit", ["--config", str(path), "--resume"])
    assert isinstance(config, FitConfig) and extra == {"resume": "newest"}
    text = path.read_text(encoding="utf-8")
    assert f"train.py fit --config configs/{path.name}" in text.split("\n\n")[0].split("name:")[0]
    with pytest.raises(SystemExit) as stop:
        cli.parse("fit", ["--config", str(path), "--train.stepz=3"])
    assert stop.value.code == 2 and "stepz" in capsys.readouterr().err


def blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Arguments of every `python train.py ...` in the README, in order."""
    lines = [part.strip() for block in blocks() for line in block.splitlines() for part in line.split("&&")]
    return [shlex.split(line)[2:] for line in lines if line.startswith("python train.py")]


def test_the_first_two_blocks_are_the_two_lines():
    install, test = blocks()[:2]
    assert install.count("\n") == test.count("\n") == 1
    assert "train.py fit --config configs/quickstart.yaml" in install
    assert '-e ".[test]"' in test and test.rstrip().endswith("python -m pytest")


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """A folder as the README assumes it, with small stand-ins for a book, chats and a downloaded checkpoint."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))  # what is typed in a chat
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    sentence = "It was a bright cold day, and the clocks were striking thirteen. "
    (tmp_path / "book.txt").write_text(sentence * 40, encoding="utf-8")
    chat = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello %d"}]}\n'
    (tmp_path / "chats.jsonl").write_text("".join(chat % i for i in range(30)), encoding="utf-8")
    case = '{"question": "Hi", "answer": "Hello", "paraphrases": ["Hi!"], "neighbours": [{"question": "Ho"}]}\n'
    (tmp_path / "cases.jsonl").write_text(case)
    (tmp_path / "corrections.jsonl").write_text(case)
    (tmp_path / "questions.txt").write_text("Who?\nWhat?\nWhen?\n")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data_home"))
    tokenizer = train_bpe([sentence], 300)
    tokenizer.save(tmp_path / "20B_tokenizer.json")
    save_model(random_model(vocab_size=tokenizer.vocab_size), tmp_path / "RWKV-4-Pile-169M.pth", dtype=torch.bfloat16)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = ["--train.steps=2", "--train.epochs=null", "--data.lanes=2", "--data.chunk-len=16", "--data.horizon=2"]


def test_readme_commands_run(newcomer, capsys):
    ran = []
    for argv in commands():
        if argv[0] == "fit" and "--resume" not in argv:
            argv = argv + SMALL + ([] if "--model.init" in argv else ["--model.n-embd=16", "--model.n-layer=1"])
        name = " ".join(argv[: 1 + (argv[0] == "bench")])
        argv = argv + TOY.get(name, [])
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        # A model of two steps learns no correction, and says so; here may be no GPU.
        fails = name == "feedback" or (name == "bench gpu" and not torch.cuda.is_available())
        assert stop.value.code == 0 or fails, f"{argv}: {capsys.readouterr().err}"
        ran.append(name)
    assert set(ran) == set(cli.COMMANDS)


def test_readme_library_examples_run(newcomer):
    (newcomer / "data").symlink_to(ROOT / "data")
    tokens = torch.randint(0, 200, (2, 1100))
    names = {"tokens": tokens, "targets": tokens, "reset": torch.zeros_like(tokens, dtype=torch.bool)}
    for code in re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        exec(code, dict(names))


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
