"""The fronts of a chat: a person at a terminal, a pipe, a live room."""

import threading
import time
from collections.abc import Iterable

from rwkv_train.chat.room import Room
from rwkv_train.chat.session import Chat, write
from rwkv_train.files import typed_lines


def in_terminal(chat: Chat) -> None:
    """Line editing, history, streamed replies. Ctrl-C stops a reply or clears the line, Ctrl-D leaves."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.patch_stdout import patch_stdout

    names = WordCompleter([f"/{name}" for name in chat.commands], sentence=True)
    session = PromptSession(history=FileHistory(chat.folder / "history"), completer=names, complete_while_typing=False)
    write("Type a message, or /help. Ctrl-C stops a reply, Ctrl-D leaves.\n\n")
    while not chat.done:
        try:
            with patch_stdout():  # what other threads tell goes above the line being typed
                line = session.prompt("> ", bottom_toolbar=lambda: chat.status or None, refresh_interval=0.5).strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if line:
            chat.show(line.replace("\\n", "\n"))


def in_plain(chat: Chat, lines: Iterable[str]) -> None:
    """Each line that is not blank is a message or command; its answer is one block, followed by an empty line."""
    for line in typed_lines(lines):
        if line := line.strip():
            chat.show(line.replace("\\n", "\n"), plain=True)
        if chat.done:
            return


def in_room(chat: Chat, lines: Iterable[str], room: Room) -> None:
    """Answer what the room picks, while a thread goes on reading lines."""
    ready, ended = threading.Condition(), threading.Event()

    def listen() -> None:
        try:
            for line in typed_lines(lines):
                with ready:
                    room.offer(line, time.monotonic())
                    ready.notify()
        finally:
            with ready:
                ended.set()
                ready.notify()

    threading.Thread(target=listen, daemon=True).start()
    while not chat.done:
        with ready:
            ready.wait_for(lambda: len(room) or ended.is_set())
            message = room.pick()
        if message is None:
            return
        write(f"{message.user}: {message.text}\n")
        chat.show(message.text)
