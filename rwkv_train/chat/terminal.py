"""The fronts of a chat: a person at a terminal, a pipe, a live room."""

import sys
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rwkv_train.chat.room import Room
from rwkv_train.chat.session import Chat, write
from rwkv_train.files import quoted, typed_lines, unescaped

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings

BREAKS = "Alt-Enter, or Esc and then Enter, begins another line."


def in_terminal(chat: Chat) -> None:
    """Line editing, history, streamed replies. Ctrl-C stops a reply or clears the line, Ctrl-D leaves.

    A text is taken as it is typed or pasted; it can have several lines.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.patch_stdout import patch_stdout

    names = WordCompleter([f"/{name}" for name in chat.commands], sentence=True)
    session = PromptSession(
        history=FileHistory(chat.folder / "history"),
        completer=names,
        complete_while_typing=False,
        multiline=True,
        key_bindings=_keys(),
    )
    write(f"Type a message, or /help. {BREAKS} Ctrl-C stops a reply, Ctrl-D leaves.\n\n")
    chat.typing = f"{BREAKS} "
    while not chat.done:
        try:
            with patch_stdout():  # what other threads tell goes above the line being typed
                line = session.prompt("> ", bottom_toolbar=lambda: chat.status or None, refresh_interval=0.5).strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            break
        if line:
            chat.show(line)
    if chat.status:
        write(f"{chat.status}; the chat ends after that\n")


def _keys() -> "KeyBindings":
    """Enter sends; Esc or Alt and Enter begins another line."""
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings

    keys, typing = KeyBindings(), has_focus(DEFAULT_BUFFER)
    keys.add("enter", filter=typing)(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter", filter=typing)(lambda event: event.current_buffer.insert_text("\n"))
    return keys


def in_plain(chat: Chat, lines: Iterable[str]) -> None:
    """Each line that is not blank is a message or command; its answer is one block, followed by an empty line.

    So that any text can be one line: \\n in it is a line break, and a doubled backslash is one.
    """
    chat.typing = r"In what is typed, \n is a line break and \\ a backslash. "
    for line in typed_lines(lines):
        if line := line.strip():
            chat.show(unescaped(line), plain=True)
        if chat.done:
            return


def in_room(chat: Chat, lines: Iterable[str], room: Room) -> None:
    """Answer what the room picks, while a thread goes on reading lines; what is not taken is told on standard error."""
    ready, ended = threading.Condition(), threading.Event()

    def listen() -> None:
        try:
            for line in typed_lines(lines):
                with ready:
                    verdict = room.offer(line, time.monotonic())
                    ready.notify()
                if verdict not in ("taken", "not for us"):
                    print(f"not taken, {verdict}: {quoted(line.strip())}", file=sys.stderr)
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
        chat.show(message.text, before=f"{message.user}: {message.text}\n")
