"""The `chat` command: a dialogue in the terminal, from a pipe, or in a live room."""

import io
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields, replace
from pathlib import Path

import platformdirs

from rwkv_train.chat.dialogue import Dialogue
from rwkv_train.chat.room import Room
from rwkv_train.checkpoints.modelfile import load_model, parts_of
from rwkv_train.command_config import ChatConfig
from rwkv_train.commands import DTYPES, tokenizer_of
from rwkv_train.data.templates import Template
from rwkv_train.files import typed_lines
from rwkv_train.generate import Sampling

STARTER = Path(__file__).parents[2] / "data" / "starter"


@dataclass(frozen=True)
class Command:
    """A slash command: how it is typed, one phrase for /help, and what it does.

    run(chat, what follows the name) returns pieces of the answer; a ValueError becomes an answer of one line.
    """

    usage: str
    phrase: str
    run: Callable[["Chat", str], Iterable[str]]


@dataclass(frozen=True)
class Setting:
    """What /settings shows and changes; set raises ValueError for a value that cannot be."""

    get: Callable[[], object]
    set: Callable[[str], None]


class Chat:
    """A dialogue and the commands that go with it; whoever shows it asks it to answer one line after the other.

    commands, settings: by name, to add to. before_answer: called before each line is answered, between replies, the
    moment to give the dialogue another model. closing: what must end with the chat (`chat.closing.callback(f)`).
    folder: for saved dialogues.
    """

    def __init__(self, dialogue: Dialogue, folder: Path):
        self.dialogue, self.folder, self.done = dialogue, folder, False
        self.commands = dict(COMMANDS)
        self.settings = _settings(dialogue)
        self.before_answer: list[Callable[[], None]] = []
        self.closing = ExitStack()
        self.status = ""  # what goes on in the background, in a few words
        self._screen = threading.RLock()

    def answer(self, line: str) -> Iterator[str]:
        """Pieces of the answer to a message or slash command; what is wrong with it is an answer too."""
        try:
            for call in self.before_answer:
                call()
            if not line.startswith("/"):
                yield from spoken(self.dialogue.say(line))
                return
            name, _, rest = line[1:].partition(" ")
            if name in self.commands:
                yield from self.commands[name].run(self, rest.strip())
            else:
                yield f"there is no command /{name}; /help lists them"
        except (ValueError, OSError) as error:
            yield " ".join(str(error).split())

    def show(self, line: str, plain: bool = False) -> None:
        """Print the answer to a line as it comes, and an empty line. Ctrl-C breaks the answer off.

        plain: at once instead and without empty lines in it; then Ctrl-C goes on to the caller.
        """
        with self._screen, closing(self.answer(line)) as pieces:
            if plain:
                _write(re.sub(r"\n\s*\n", "\n", "".join(pieces).strip()))
            else:
                try:
                    for piece in pieces:
                        _write(piece)
                except KeyboardInterrupt:
                    pieces.close()
                    _write(" [stopped]")
            _write("\n\n")

    def tell(self, text: str) -> None:
        """Print something from any thread, between two answers."""
        with self._screen:
            _write(text + "\n\n")


def spoken(reply: Iterator[str]) -> Iterator[str]:
    """A reply's pieces, or a note where there are none. Closing this breaks the reply off."""
    empty = True
    with closing(reply):
        for piece in reply:
            empty = False
            yield piece
    if empty:
        yield "(empty reply)"


def _help(chat: Chat, rest: str) -> Iterable[str]:
    return ["\n".join(f"{c.usage:<28}{c.phrase}" for c in chat.commands.values())]


def _retry(chat: Chat, rest: str) -> Iterable[str]:
    return spoken(chat.dialogue.retry())


def _back(chat: Chat, rest: str) -> Iterable[str]:
    chat.dialogue.back(number(rest or "1", int))
    turns = chat.dialogue.turns
    return [f"back at: {turns[-1].reply}" if turns else "back at the beginning"]


def _state(chat: Chat, rest: str) -> Iterable[str]:
    action, _, name = rest.partition(" ")
    name = name.strip()
    if action not in ("save", "load") or not re.fullmatch(r"[\w-]+", name):
        raise ValueError("write /state save NAME or /state load NAME, with letters, digits, - and _ in NAME")
    path = chat.folder / "dialogues" / f"{name}.state"
    if action == "save":
        chat.dialogue.save(path)
        return [f"saved {len(chat.dialogue.turns)} turns as {name}"]
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.state"))) or "none"
        raise ValueError(f"no dialogue is saved as {name}; there are: {known}")
    chat.dialogue.load(path)
    return [f"loaded {len(chat.dialogue.turns)} turns; the last reply was: {chat.dialogue.last().reply}"]


def _system(chat: Chat, rest: str) -> Iterable[str]:
    chat.dialogue.system(rest)
    return ["goes before your next message" if rest else "no system message before your next message"]


def _set(chat: Chat, rest: str) -> Iterable[str]:
    name, _, value = rest.partition(" ")
    if not name:
        return ["\n".join(f"{name:<20}{s.get()}" for name, s in chat.settings.items())]
    if name not in chat.settings:
        raise ValueError(f"there is no setting {name}; there are: {', '.join(chat.settings)}")
    if value:
        chat.settings[name].set(value.strip())
    return [f"{name} {chat.settings[name].get()}"]


def _quit(chat: Chat, rest: str) -> Iterable[str]:
    chat.done = True
    return ["bye"]


COMMANDS = {
    "help": Command("/help", "list the commands", _help),
    "retry": Command("/retry", "another reply to your last message", _retry),
    "back": Command("/back [N]", "unsay the last turn, or the last N", _back),
    "state": Command("/state save|load NAME", "keep the conversation, or go on with a kept one", _state),
    "system": Command("/system TEXT", "a system message before your next message", _system),
    "settings": Command("/settings [NAME [VALUE]]", "show or change how replies are sampled", _set),
    "quit": Command("/quit", "leave, as does Ctrl-D", _quit),
}


def _settings(dialogue: Dialogue) -> dict[str, Setting]:
    def sampled(name: str, kind: type) -> Setting:
        def change(value: str) -> None:
            dialogue.sampling = replace(dialogue.sampling, **{name: number(value, kind)})

        return Setting(lambda: getattr(dialogue.sampling, name), change)

    found = {f.name: sampled(f.name, f.type) for f in fields(Sampling)}
    found["seed"] = Setting(lambda: dialogue.rng.initial_seed(), lambda value: dialogue.reseed(number(value, int)))
    found["tokens"] = Setting(lambda: dialogue.max_new_tokens, lambda value: dialogue.limit(number(value, int)))
    return found


def number(text: str, kind: type) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"expected {'a whole number' if kind is int else 'a number'}, found {text!r}") from None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def in_terminal(chat: Chat) -> None:
    """Line editing, history, streamed replies. Ctrl-C stops a reply or clears the line, Ctrl-D leaves."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.patch_stdout import patch_stdout

    chat.folder.mkdir(parents=True, exist_ok=True)
    names = WordCompleter([f"/{name}" for name in chat.commands], sentence=True)
    session = PromptSession(history=FileHistory(chat.folder / "history"), completer=names, complete_while_typing=False)
    _write("Type a message, or /help. Ctrl-C stops a reply, Ctrl-D leaves.\n\n")
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
        _write(f"{message.user}: {message.text}\n")
        chat.show(message.text)


def open_chat(config: ChatConfig) -> Chat:
    """The model, tokenizer and template that the settings name, as a chat about to begin."""
    sampling = Sampling(**{f.name: getattr(config, f.name) for f in fields(Sampling)})
    path = weights_in(config.model or STARTER)
    if not config.model and not path.is_file():
        raise ValueError(f"the starter model is not there ({path}); name a model with --model")
    model = load_model(path, DTYPES[config.dtype], config.device)
    tokenizer = tokenizer_of(str(path), config.tokenizer, model.config.vocab_size)
    dialogue = Dialogue(model, tokenizer, template_of(path, config.template), sampling, config.seed, config.tokens)
    dialogue.system(config.system)
    return Chat(dialogue, data_folder(config.folder))


def template_of(path: Path, given: str | None = None) -> Template:
    """The template that was given, or lies beside a model as template.yaml, or the World models'."""
    path = parts_of(path)[0]
    beside = (path.parent if path.is_file() else path) / "template.yaml"
    found = given or (beside if beside.is_file() else None)
    return Template.load(found) if found else Template()


def data_folder(given: str | None) -> Path:
    """Where what belongs to the user is kept."""
    return Path(given or platformdirs.user_data_dir("rwkv_train")).expanduser()


def weights_in(model: str | Path) -> Path:
    """A model's path; of a folder with model.pth, as the starter model's, that file."""
    path = Path(model).expanduser()
    return path / "model.pth" if (path / "model.pth").is_file() else path


def chat(config: ChatConfig) -> None:
    """Talk to a model until the end of input or /quit."""
    operators = frozenset(name.strip() for name in config.operators.split(",") if name.strip())
    limits = {"queue": config.queue, "per_user": config.per_user, "rate": config.rate}
    room = Room(config.prefix, config.pick, **limits, operators=operators, seed=config.seed)
    opened = open_chat(config)
    in_person = not (config.plain or config.room) and sys.stdin.isatty()
    with opened.closing:
        if config.dtype == "fp32":
            from rwkv_train.chat.feedback_commands import Teacher, profile_folder  # which imports this module

            folder = profile_folder(opened.folder, config.profile, config.model or STARTER)
            Teacher(opened, folder, wait=not (in_person or config.room))
        if in_person:
            return in_terminal(opened)
        if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are no UTF-8 are a mistake of one line, not the end
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
        if config.room:
            in_room(opened, sys.stdin, room)
        else:
            in_plain(opened, sys.stdin)
