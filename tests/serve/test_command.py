"""`serve` before it serves: what it refuses, in one line."""

import socket
import sys

import pytest
from helpers import run
from served import TOKEN_FILE, small_config


@pytest.fixture
def flags(tmp_path):
    config = small_config(tmp_path)
    return [f"--model={config.model}", "--tokenizer=bytes", f"--folder={tmp_path / 'data'}"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--lanes=0"], "--lanes must be at least 1, found 0"),
        (["--host=0.0.0.0", "--port=0"], "tokens are needed"),
        (["--tokens=nothing.yaml", "--port=0"], "nothing.yaml"),
        (["--reply-tokens=5000", "--port=0"], "--most-tokens"),
        (["--profiles=[base]", "--port=0"], "name the profile otherwise"),
        (["--model=nothing.pth", "--port=0"], "nothing.pth"),
        (["--port=99999"], "port 99999"),
        (["--host=nowhere.invalid", "--port=0"], "nowhere.invalid"),
        (["--queue=0", "--port=0"], "queue must be at least 1"),
    ],
)
def test_a_server_that_cannot_begin(flags, capsys, given, told):
    code, out, err = run("serve", *flags, *given, capsys=capsys)
    assert code == 1 and told in err.splitlines()[-1] and "Traceback" not in err and "serving" not in out


def test_a_port_that_is_taken(flags, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = run("serve", *flags, f"--port={taken.getsockname()[1]}", capsys=capsys)
    assert code == 1 and "in use" in err and "name another --port" in err


def test_what_is_not_installed_is_named(flags, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("rwkv_train.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = run("serve", *flags, capsys=capsys)
    assert code == 1 and err.count("\n") == 1 and 'uvicorn: pip install "rwkv_train[serve]"' in err


def test_an_address_that_others_reach_needs_tokens(tmp_path):
    from rwkv_train.serve.command import open_server

    (tmp_path / "tokens.yaml").write_text(TOKEN_FILE)
    opened = open_server(small_config(tmp_path, host="0.0.0.0", tokens=str(tmp_path / "tokens.yaml")))
    assert len(opened.app.tokens) == 3
    for learner in opened.service.learners.values():
        learner.close()
