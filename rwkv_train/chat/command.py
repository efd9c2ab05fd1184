"""The `chat` command: opens a model, hands in the feedback commands, and shows the chat where it is asked for."""

import io
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

from rwkv_train import program
from rwkv_train.chat.dialogue import Dialogue
from rwkv_train.chat.feedback_commands import Teacher
from rwkv_train.chat.opening import data_folder, open_profile
from rwkv_train.chat.room import Room
from rwkv_train.chat.session import Chat
from rwkv_train.chat.terminal import in_plain, in_room, in_terminal
from rwkv_train.checkpoints.opener import Opened, open_for
from rwkv_train.command_config import ChatConfig
from rwkv_train.data.functions import named, read_tools
from rwkv_train.feedback.settings import RENAMED
from rwkv_train.generation.presets import sampling_of, stop_texts


def chat(config: ChatConfig) -> int:
    """Talk to a model until the end of input or /quit. The exit code: 1 if a line that was piped failed."""
    _check_flags(config)
    operators = frozenset(name.strip() for name in config.operators.split(",") if name.strip())
    limits = {"queue": config.queue, "per_user": config.per_user, "rate": config.rate}
    room = Room(config.prefix, config.pick, **limits, operators=operators, seed=config.seed)
    opened = open_chat(config)
    in_person = not (config.plain or config.room) and sys.stdin.isatty()
    with opened.closing:
        teacher = open_teacher(opened, config, wait=not (in_person or config.room))
        opened.add(teacher.commands(), teacher.settings(), teacher.swap, RENAMED)
        if in_person:
            in_terminal(opened)
            return 0
        if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are no UTF-8 are a mistake of one line, not the end
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
        if config.room:
            in_room(opened, sys.stdin, room)
            return 0
        in_plain(opened, sys.stdin)
        return 1 if opened.failures else 0


def _check_flags(config: ChatConfig) -> None:
    """ValueError for a flag that would do nothing."""
    usual = {f.name: f.default for f in fields(ChatConfig)}
    for name in ("prefix", "pick", "queue", "per_user", "rate", "operators"):
        if not config.room and getattr(config, name) != usual[name]:
            raise ValueError(f"--{name.replace('_', '-')} is for a live room; give --room as well, or leave it out")
    if config.room and config.plain:
        raise ValueError("found both --room and --plain; a live room has its own way to answer: give one of them")


def open_chat(config: ChatConfig) -> Chat:
    """The model, tokenizer and template that the settings name, as a chat about to begin."""
    sampling, stops = sampling_of(config), stop_texts(config.stop)
    if not config.model and not program.STARTER.exists():
        raise ValueError(f"the starter model is not there ({program.STARTER}); name a model with --model")
    name = config.model or program.STARTER
    opened = open_for(config, name)
    dialogue = Dialogue(*opened, sampling, config.seed, config.tokens, stops)
    dialogue.functions = named(read_tools(config.tools)) if config.tools else ""
    dialogue.system(config.system)
    try:
        return Chat(dialogue, data_folder(config.folder))
    except ValueError as error:
        if config.folder:
            raise
        print(f"{error}. Typed lines, saved dialogues and corrections are lost when this chat ends.", file=sys.stderr)
    lost = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    chat = Chat(dialogue, Path(lost.name))
    chat.closing.enter_context(lost)
    return chat


def open_teacher(chat: Chat, config: ChatConfig, wait: bool) -> Teacher:
    """What corrects the chat's model, until the chat ends; wait: see `Teacher`."""
    dialogue, model = chat.dialogue, config.model or program.STARTER
    opened = Opened(dialogue.model, dialogue.tokenizer, dialogue.template)
    learner = open_profile(opened, chat.folder, config.profile, model, config.memory)
    chat.closing.callback(learner.close)
    return chat.closing.enter_context(Teacher(chat, learner, wait))
