"""The chat command: scripts through a pipe, a terminal with typed keys, and who is answered in a live room."""

import io
import sys
import threading
from itertools import chain, repeat

import pytest
from helpers import random_model, run

from rwkv_train import program, save_model
from rwkv_train.chat import session
from rwkv_train.chat.command import open_chat, open_teacher
from rwkv_train.chat.dialogue import Dialogue
from rwkv_train.chat.session import COMMANDS, Chat, Command
from rwkv_train.chat.terminal import in_terminal
from rwkv_train.cli import parse
from rwkv_train.command_config import ChatConfig
from rwkv_train.data.templates import Template
from rwkv_train.data.text_format import TextFormat
from rwkv_train.generate import Sampling, random_numbers
from rwkv_train.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(random_model(vocab_size=257), "starter/model.pth")
    TextFormat(BYTES, Template()).save(tmp_path / "starter")
    monkeypatch.setattr(program, "STARTER", tmp_path / "starter")


def talk(text, *argv, capsys, monkeypatch, told="", exit_code=0) -> list[str]:
    """The blocks that `chat` prints for this input; told: what it prints on standard error."""
    data = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    code, out, err = run("chat", "--folder=kept", "--tokens=20", *argv, capsys=capsys)
    assert (code, err) == (exit_code, told)
    assert out == "" or out.endswith("\n\n")
    return out.split("\n\n")[:-1]


@pytest.fixture
def say(model, capsys, monkeypatch):
    return lambda text, *argv, **told: talk(text, *argv, capsys=capsys, monkeypatch=monkeypatch, **told)


def as_library(lines, **kwargs) -> list[str]:
    """The replies that a dialogue without the command gives."""
    d = Dialogue(random_model(vocab_size=257), BYTES, **{"sampling": Sampling(0.8, 0.5), "max_new_tokens": 20} | kwargs)
    for line in lines:
        list(d.say(line))
    return [turn.reply or "(empty reply)" for turn in d.turns]


def test_a_script_of_turns_is_the_library_without_the_terminal(say):
    lines = ["Hello", "你好", "two\\nlines"]
    answers = say("\n\n".join(lines))  # blank lines are no turns
    assert answers == as_library(line.replace("\\n", "\n") for line in lines)
    assert answers == say("\r\n".join(lines)) == say("\n".join(lines), "--plain", "--model=starter")
    assert answers == say("\n".join(lines), "--model=starter/model.pth", "--plain=true")
    assert answers != say("\n".join(lines), "--seed=1")
    assert say("") == []


def test_commands(say):
    straight = say("a\nb\nc", "--temperature=0")
    detour = "a|/settings|/state save one|x|y|/back 2|b|/retry|wrong|/back|c|/state load one|b|/quit|never"
    blocks = say(detour.replace("|", "\n"), "--temperature=0")
    a, listed, saved, _, _, back, b, retried, _, back_at, c, loaded, again, bye = blocks
    assert [a, b, c] == straight and b == retried == again
    names = [line.split()[0] for line in listed.split("\n")]
    assert "temperature         0.0" in listed and {"seed", "tokens", "trainable", "step_factor", "max_kl"} < set(names)
    assert saved == "saved 1 turns as one" and loaded.startswith("loaded 1 turns") and bye == "bye"
    assert back.startswith("back at: ") and back_at.startswith("back at: ")
    assert "/state save" in say("/help")[0] and set(COMMANDS) < {
        line.split()[0][1:] for line in say("/help")[0].split("\n")
    }


def test_a_state_alone_goes_from_one_chat_to_another(say):
    ours = say("a\n/state export one\nb", "--temperature=0")
    assert ours[1].startswith("kept/dialogues/one.pth: the state after 1 turn")
    for name in ("one", "kept/dialogues/one.pth"):
        told, reply, back, _, none = say(
            f"/state import {name}\nb\n/back\n/back\n/retry", "--temperature=0", exit_code=1
        )
        assert "It holds no text" in told and reply == ours[2]
        assert back == "back at: (the state of one.pth)" and "nothing has been said" in none


def test_any_text_can_be_typed_in_one_line(say):
    r"""\n is a line break, \\ a backslash, everything else itself; a byte order mark is none of the text."""
    typed = r"C:\\new \\\\srv\dir a\nb \t \\"
    meant = "C:\\new \\\\srv\\dir a\nb \\t \\"
    saved = say(b"\xef\xbb\xbf" + typed.encode() + b"\n/state save one\n")
    assert saved == [*as_library([meant]), "saved 1 turns as one"]
    assert say("//etc/passwd") == as_library(["/etc/passwd"])
    assert r"\n is a line break and \\ a backslash" in say("/help")[0]


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_corrections_are_there_in_every_number_format_and_a_profile_has_one(say, dtype, capsys):
    if dtype == "int8":
        pytest.importorskip("torchao")
    assert say("/history", f"--dtype={dtype}", "--profile=mine") == ["nothing was learnt yet"]
    code, _, err = run("chat", "--folder=kept", "--profile=mine", capsys=capsys)
    assert code == 1 and f"begun with a model in {dtype}, and this one is in fp32; open it with --dtype {dtype}" in err


def test_settings_and_system_are_those_of_the_flags(say):
    flags = say("a\nb", "--temperature=0", "--tokens=7", "--system=S")
    assert flags == say("/settings temperature 0\n/settings tokens 7\n/system S\na\nb")[3:]
    assert say("a", "--seed=5") == say("/settings seed 5\na")[1:]
    assert say("/settings top_k 2\n/settings top_k")[1] == "top_k 2"
    flags = say("a\nb", "--preset=fake-thinking", "--stop=e", "--stop=o")
    assert flags == say("/settings preset fake-thinking\na\nb", "--stop=e", "--stop=o")[1:]
    assert not set("eo") & set("".join(flags).replace("(empty reply)", ""))
    shown = say("/settings preset\n/settings min_p 0.1\n/settings preset")
    assert shown == [
        "preset chat: temperature 0.8, top_p 0.5", "min_p 0.1", "preset none: temperature 0.8, top_p 0.5, min_p 0.1"
    ]  # fmt: skip
    with_template = "roles:\n  user: 'Q: {content}\n\n    '\n  assistant: 'A: {content}\n\n    '\n"
    with open("starter/template.yaml", "w") as f:
        f.write(with_template)
    assert say("/system x\na\nb", "--temperature=0", "--profile=new", exit_code=1)[0].startswith(
        "role 'system' is unknown"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/hlep", "/help"),
        ("/back", "0 turns"),
        ("/back 1 2", "whole number, found '1 2'"),
        ("/retry now", "/retry takes nothing after it, found 'now'"),
        ("/quit now", "/quit takes nothing"),
        ("/help back", "/help takes nothing"),
        ("/history all", "/history takes nothing"),
        ("/good text", "/good takes nothing"),
        ("/bad\\ntext", "/bad takes nothing"),
        ("/diff x", "/diff takes nothing"),
        ("/undo x", "whole number, found 'x'"),
        ("/undo 1 2", "whole number, found '1 2'"),
        ("/undo 0", "0 corrections to undo, not 0"),
        ("/state load x y", "/state load NAME"),
        ("/settings seed 1 2", "whole number, found '1 2'"),
        ("/back x", "whole number, found 'x'"),
        ("/retry", "nothing has been said"),
        ("/state", "/state save NAME"),
        ("/state save ../x", "letters, digits"),
        ("/state save x", "nothing has been said"),
        ("/state load x", "there are: none"),
        ("/state export x", "nothing has been said"),
        ("/state import x", "dialogues/x.pth: no such file"),
        ("/state import starter/model.pth", "holds a dict, expected a list of tensors"),
        ("/settings top_p 2", "top_p must be above 0"),
        ("/settings preset wild", "there are: chat, text"),
        ("/settings temperature hot", "a number, found 'hot'"),
        ("/settings tokens 0", "at least 1"),
        ("/settings loudness", "there are: preset, temperature"),
        (b"a\xffb", "surrogate"),
    ],
)
def test_a_mistake_is_one_line_and_the_chat_goes_on(line, message, say):
    line = line if isinstance(line, bytes) else line.encode()
    wrong, reply = say(line + b"\nHello", exit_code=1)
    assert message in wrong and "\n" not in wrong
    assert [reply] == as_library(["Hello"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model"),
        (["--model=nothing.pth"], "nothing.pth"),
        (["--temperature=-1"], "temperature"),
        (["--room", "--queue=0"], "queue"),
        (["--prefix=?"], "--prefix is for a live room"),
        (["--per-user=1"], "--per-user is for a live room"),
        (["--operators=op", "--plain"], "--operators is for a live room"),
        (["--room", "--plain"], "both --room and --plain"),
    ],
)
def test_a_chat_that_cannot_begin(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "STARTER", tmp_path / "nothing")
    code, out, err = run("chat", *argv, capsys=capsys)
    assert code == 1 and message in err and err.count("\n") == 1 and not out


def test_switches_stand_alone():
    for argv, wanted in (
        (["--plain"], (True, False)),
        (["--plain", "false", "--room", "--seed=1"], (False, True)),
    ):
        config, _ = parse("chat", argv)
        assert isinstance(config, ChatConfig) and (config.plain, config.room) == wanted


def chat_of(tmp_path, **kwargs) -> Chat:
    model = random_model(vocab_size=257)
    return Chat(Dialogue(model, BYTES, **{"sampling": Sampling(0), "max_new_tokens": 8} | kwargs), tmp_path)


def test_typed_in_a_terminal(tmp_path, capsys):
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    chat = chat_of(tmp_path)
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("wrong\x03")  # Ctrl-C clears the line
        keys.send_text("Helo\x02l\r\r")  # Ctrl-B goes left: Hello, then an empty line
        keys.send_text("/back\rone\x1b\rtwo \\nabla\\\\\r")  # Alt-Enter breaks the line; a backslash is one
        keys.send_text("\x1b[200~a\r\nb\n\tc\x1b[201~\r")  # pasted
        keys.send_text("/help\r\x04never\r")  # Ctrl-D leaves
        in_terminal(chat)
    assert [turn.user for turn in chat.dialogue.turns] == ["one\ntwo \\nabla\\\\", "a\nb\n\tc"]
    out = capsys.readouterr().out
    assert chat.dialogue.last().reply in out and out.count("Alt-Enter") == 2  # in the greeting and in /help
    assert "+Hello\n" in (tmp_path / "history").read_text()


def test_ctrl_c_stops_the_reply_and_not_the_chat(tmp_path, capsys, monkeypatch):
    chat = chat_of(tmp_path, sampling=script(" abcdef\n\n" * 3))
    printed = []

    def write(text):
        if len(printed) == 3:
            printed.append("^C")
            raise KeyboardInterrupt
        printed.append(text)

    monkeypatch.setattr(session, "write", write)
    for line in ("a", "/retry"):
        printed.clear()
        chat.show(line)
        assert "".join(printed) == "abc^C [stopped]\n\n"
        assert chat.dialogue.turns[-1].reply == "abcd"
        chat.dialogue.sampling = script(" abcdef\n\n")
    printed.clear()
    with pytest.raises(KeyboardInterrupt):  # a script is stopped as a whole
        for line in "bcde":
            chat.show(line, plain=True)


def test_ctrl_c_hides_nothing_that_a_script_was_told(tmp_path, capsys):
    def learn(chat, rest):
        yield "received as correction 2\n"
        raise KeyboardInterrupt

    chat = chat_of(tmp_path)
    chat.add({"teach": Command("/teach", "learn", learn)}, {}, before_answer=lambda: None)
    with pytest.raises(KeyboardInterrupt):
        chat.show("/teach", plain=True)
    assert capsys.readouterr().out == "received as correction 2"


def script(text):
    """In place of a sampling: says a text, and then nothing more."""
    return chain(BYTES.encode(text), repeat(BYTES.eod))


def test_what_others_may_add(tmp_path, capsys):
    """A command, a call between replies, something told by another thread, and something to end."""
    chat, order = chat_of(tmp_path), []
    shout = Command("/shout TEXT", "say it loudly", lambda chat, rest: [rest.upper(), "!"])
    chat.add({"shout": shout}, {}, before_answer=lambda: order.append(len(chat.dialogue.turns)))
    chat.closing.callback(order.append, "closed")
    with chat.closing:
        for line in ("/shout hey", "a", "b"):
            chat.show(line)
        thread = threading.Thread(target=chat.tell, args=["learnt"])
        thread.start()
        thread.join()
    blocks = capsys.readouterr().out.split("\n\n")
    assert blocks[0] == "HEY!" and blocks[-2] == "learnt" and order == [0, 0, 1, "closed"]


def test_a_room(say):
    chat = "ann: !Hello\nbob: not for the model\nno message\nbob: !/quit\neve: !你好\nann: !/settings top_k 1\n"
    told = 'not taken, not an operator: "bob: !/quit"\n'
    blocks = say(chat, "--room", "--operators=ann, cyd", "--temperature=0", told=told)
    answers = dict(block.split("\n", 1) for block in blocks)
    assert answers.keys() == {"ann: Hello", "eve: 你好", "ann: /settings top_k 1"}
    assert answers["ann: /settings top_k 1"] == "top_k 1"
    hello, hi = as_library(["Hello", "你好"], sampling=Sampling(0))
    assert (answers["ann: Hello"], answers["eve: 你好"]) == (hello, hi)
    assert say("ann: !/quit\n", "--room", "--operators=ann") == ["ann: /quit\nbye"]
    assert say("", "--room") == []
    assert say("ann: !a\\nb\nann: !//x\n", "--room", "--temperature=0") == [
        f"ann: {typed}\n{reply}"
        for typed, reply in zip(["a\\nb", "//x"], as_library(["a\\nb", "/x"], sampling=Sampling(0)), strict=True)
    ]


def test_a_room_tells_what_it_does_not_take(say):
    told = 'not taken, not an operator: "ann: !/quit"\nnot taken, empty: "ann: !"\n'
    assert say("just talk\nann: !/quit\nann: !\n", "--room", told=told) == []


def test_a_seed_is_taken_as_it_is_or_refused():
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=f"a seed must be at least 0 and below .*found {seed}"):
            random_numbers(seed)
    assert random_numbers(2**63 - 1).initial_seed() == 2**63 - 1


def test_a_chat_is_written_as_the_model_was_trained(model, tmp_path, capsys):
    """What is asked, and what a correction of it trains."""
    own = Template({"user": "<u>{content}</u>", "assistant": "<a>{content}</a>"})
    TextFormat(BYTES, own).save(tmp_path / "starter")
    config = ChatConfig(folder=str(tmp_path), tokens=4)
    chat = open_chat(config)
    with chat.closing:
        list(chat.answer("Hello"))
        teacher = open_teacher(chat, config, wait=True)
        assert BYTES.decode(chat.dialogue.ids).startswith("<u>Hello</u><a>")
        assert teacher.learner.form.template == own
    assert capsys.readouterr().err == ""
