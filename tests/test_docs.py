"""README and docs keep their promises: the two lines, every command, every example, every link."""

import asyncio
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import uvicorn
from bench_toys import TOY
from feedback_toys import BYTES, CONFIG
from helpers import random_model
from hub_stand_in import StandIn, listening, use

import rwkv_train.feedback.learner as learner_module
from rwkv_train import cli, program, save_model
from rwkv_train.feedback import FeedbackConfig
from rwkv_train.tokenizer import train_bpe

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
TASKS = [
    "train.md",
    "models.md",
    "data.md",
    "correct.md",
    "plan.md",
    "survive.md",
    "speed.md",
    "library.md",
    "serve.md",
]
SMALL = ["--train.steps=2", "--train.epochs=null", "--data.lanes=2", "--data.chunk-len=16", "--data.horizon=2"]
FEWER = {  # than in test_bench.py
    "bench wkv": ["--operators=[wkv7]", "--tokens=[5]", "--dtypes=[fp32]", "--repeats=1"],
    "bench train": ["--peers=false", "--precisions=[fp32]", "--repeats=1", "--json=train.json"],
    "bench memory": ["--lora-size="],
    "bench generate": ["--peers=false", "--repeats=1"],
    "bench serve": ["--model=runs/chats", "--sessions=[2]", "--history=[10]"],
    "serve": ["--port=0"],
}
SENTENCE = "It was a bright cold day, and the clocks were striking thirteen. "
CASE = '{"question": "Hi", "answer": "Hello", "paraphrases": ["Hi!"], "neighbours": [{"question": "Ho"}]}\n'


def blocks(page: str, language: str = "bash") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Arguments of every `python train.py ...`, page by page, as they run here: with flags that keep them small."""
    lines = [part.strip() for page in PAGES for block in blocks(page) for part in re.split("&&|\n", block)]
    argvs = [shlex.split(line)[2:] for line in lines if line.startswith("python train.py")]
    return [argv + _toy_flags(argv) for argv in argvs]


def _toy_flags(argv: list[str]) -> list[str]:
    if argv[0] == "fit" and "--resume" not in argv:
        return SMALL + ([] if "--model.init" in argv else ["--model.n-embd=64", "--model.n-layer=1"])
    if argv[0] == "prepare" and argv[1].startswith("corpus:"):
        return ["--limit=60"]
    name = " ".join(argv[:2])
    return TOY.get(name, []) + FEWER.get(name, [])


def test_the_first_two_blocks_are_the_two_lines():
    install, test = blocks("README.md")[:2]
    assert install.count("\n") == test.count("\n") == 1
    assert "train.py fit --config configs/quickstart.yaml" in install
    assert '-e ".[test]"' in test and test.rstrip().endswith("python -m pytest")


def test_the_readme_is_short_and_pages_begin_with_a_command():
    assert PAGES["README.md"].count("\n") <= 250
    for page in TASKS:
        assert PAGES[page].split("\n")[2] == "```bash", f"docs/{page} does not begin with a command"
        assert f"(docs/{page})" in PAGES["README.md"]


def headings(text: str) -> set[str]:
    """As links name them: "## To other programs" is to-other-programs."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_and_named_files_are_there():
    for page, text in PAGES.items():
        here = ROOT if page == "README.md" else ROOT / "docs"
        for path, heading in re.findall(r"\]\((?!https?:)([^)#]+)#?([^)]*)\)", text):
            assert (here / path).exists(), f"{page}: {path}"
            assert not heading or heading in headings(PAGES[path]), f"{page}: {path}#{heading}"
        for name in re.findall(r"(?:tests|configs|rwkv_train|data/benchmarks)/[\w/.-]*\.\w+", text):
            assert (ROOT / name).exists(), f"{page}: {name}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as the pages assume it: small stand-ins for a book, chats, the starter and a downloaded checkpoint."""
    folder = tmp_path_factory.mktemp("newcomer")
    for name in ("configs", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    chat = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello %d"}]}\n'
    texts = {
        "book.txt": SENTENCE * 40,
        "chats.jsonl": "".join(chat % i for i in range(30)),
        "cases.jsonl": CASE,
        "corrections.jsonl": CASE,
        "questions.txt": "Who?\nWhat?\nWhen?\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    tokenizer = train_bpe([SENTENCE], 300)
    tokenizer.save(folder / "20B_tokenizer.json")
    save_model(random_model(vocab_size=tokenizer.vocab_size), folder / "RWKV-4-Pile-169M.pth", dtype=torch.bfloat16)
    seven = random_model(vocab_size=65_536, n_embd=8, generation="rwkv7")
    save_model(seven, folder / "rwkv7-g1d-0.1b-20260129-ctx8192.pth", dtype=torch.bfloat16)
    starter = folder / "data" / "starter"
    starter.mkdir(parents=True)
    save_model(random_model(n_embd=48, vocab_size=257), starter / "model.pth")
    BYTES.save(starter / "tokenizer.json")
    (starter / "template.yaml").symlink_to(ROOT / "data" / "starter" / "template.yaml")
    return folder


@pytest.fixture(scope="module")
def released():
    """A stand-in for the Hugging Face hub, with a small model under the name of a released one."""
    content = io.BytesIO()
    torch.save(dict(random_model(vocab_size=65536, generation="rwkv7").state_dict()), content)
    with listening(StandIn()) as hub:
        hub.commit("BlinkDL/rwkv7-g1", {"rwkv7-g1d-0.1b-20260129-ctx8192.pth": content.getvalue()})
        yield hub


@pytest.fixture
def newcomer(folder, released, monkeypatch):
    monkeypatch.chdir(folder)
    use(monkeypatch, released, folder / "hub")
    monkeypatch.setenv("XDG_DATA_HOME", str(folder / "data_home"))
    monkeypatch.setattr(program, "STARTER", folder / "data" / "starter")
    return folder


def test_commands_run(newcomer, capsys, monkeypatch):
    """Each once, in the order in which somebody reads the pages."""
    monkeypatch.setattr("rwkv_train.bench.case_sets.SINGLES", 1)
    monkeypatch.setattr(uvicorn.Server, "main_loop", lambda self: asyncio.sleep(0))  # a server that begins, and ends
    ran = {}
    for argv in commands():
        name = " ".join(argv[: 1 + (argv[0] == "bench")])
        settings = repr(cli.parse(name, argv[len(name.split()) :]))
        if (name, settings) in ran:
            continue
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))  # what is typed in a chat
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        # A model of two steps learns no correction, and says so; here may be no GPU.
        fails = name == "feedback" or (name == "bench gpu" and not torch.cuda.is_available())
        assert stop.value.code == 0 or fails, f"{argv}: {capsys.readouterr().err}"
        ran[name, settings] = argv
    assert {name for name, _ in ran} == set(cli.COMMANDS)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_library_examples_run(newcomer, page, monkeypatch):
    recipe = {"trainable": "full", "steps": 300}  # with which a model of random weights learns a sentence
    monkeypatch.setattr(learner_module, "FeedbackConfig", lambda **k: FeedbackConfig(**(vars(CONFIG) | recipe | k)))
    for code in blocks(page, "python"):
        exec(code, {})
