"""A chat: a dialogue, the slash commands and settings that go with it, and showing one answer after the other."""

import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields, replace
from pathlib import Path

from rwkv_train.chat.dialogue import Dialogue, Thought
from rwkv_train.generation.presets import PRESETS, described
from rwkv_train.generation.sampling import Sampling


@dataclass(frozen=True)
class Command:
    """A slash command: how it is typed, one phrase for /help, and what it does.

    run(chat, what follows the name) returns pieces of the answer; a ValueError becomes an answer of one line. One whose
    usage is its name alone is refused if anything follows it.
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

    commands, settings: by name; `add` takes more of them. renamed: settings' names of before, and of today. typing: for
    /help, how a text is typed here that is not taken as it stands. closing: what must end with the chat, as
    `chat.closing.callback(f)`. failures: lines that were refused, and corrections that were not learnt. folder: for
    saved dialogues. lines, typed: how many were typed, and when the last one was, in seconds of time.monotonic().
    """

    def __init__(self, dialogue: Dialogue, folder: Path):
        self.dialogue, self.folder, self.done = dialogue, folder, False
        self.failures = 0
        self.commands = dict(COMMANDS)
        self.settings = _settings(dialogue)
        self.renamed: dict[str, str] = {}
        self.typing = ""
        self._before_answer: list[Callable[[], None]] = []
        self.lines, self.typed = 0, time.monotonic()
        self.closing = ExitStack()
        self.status = ""  # what goes on in the background, in a few words
        self._screen = threading.RLock()

    def add(
        self,
        commands: dict[str, Command],
        settings: dict[str, Setting],
        before_answer: Callable[[], None],
        renamed: dict[str, str] | None = None,
    ) -> None:
        """Take in more commands and settings, and names that some of these had before.

        before_answer: called before each line is answered, between replies: the moment to give the dialogue another
        model.
        """
        self.commands |= commands
        self.settings |= settings
        self.renamed |= renamed or {}
        self._before_answer.append(before_answer)

    def answer(self, line: str) -> Iterator[str]:
        """Pieces of the answer to a message or slash command; what is wrong with it is an answer too.

        A message that begins with a slash itself is given with two.
        """
        self.lines, self.typed = self.lines + 1, time.monotonic()
        try:
            for call in self._before_answer:
                call()
            if line.startswith("/") and not line.startswith("//"):
                yield from self._run(*re.fullmatch(r"/(\S*)\s*(.*)", line, re.DOTALL).groups())
            else:
                yield from spoken(self.dialogue.say(line[1:] if line.startswith("//") else line))
        except (ValueError, OSError) as error:
            self.failures += 1
            yield " ".join(str(error).split())

    def _run(self, name: str, rest: str) -> Iterable[str]:
        if name not in self.commands:
            why = "/help lists them; a message that begins with / is written with //"
            raise ValueError(f"there is no command /{name}: {why}")
        command, rest = self.commands[name], rest.strip()
        if rest and command.usage == f"/{name}":
            raise ValueError(f"/{name} takes nothing after it, found {rest!r}")
        return command.run(self, rest)

    def show(self, line: str, plain: bool = False, before: str = "") -> None:
        """Print the answer to a line as it comes, and an empty line. Ctrl-C breaks the answer off.

        plain: at once instead and without empty lines in it; then Ctrl-C goes on to the caller. before: printed first.
        Thoughts are dimmed on a terminal, and left out elsewhere.
        """
        dims = not plain and sys.stdout.isatty()
        with self._screen, closing(self.answer(line)) as pieces:
            if before:
                write(before)
            if plain:
                said: list[str] = []
                try:
                    for piece in pieces:
                        said += [] if isinstance(piece, Thought) else [piece]
                finally:  # an interrupt does not hide what came before it
                    write(re.sub(r"\n\s*\n", "\n", "".join(said).strip()))
            else:
                try:
                    thinking = False
                    for piece in pieces:
                        if not isinstance(piece, Thought):
                            write("\n" * thinking + piece)
                        elif dims:
                            write(f"\x1b[2m{piece}\x1b[0m")
                        thinking = dims and isinstance(piece, Thought)
                except KeyboardInterrupt:
                    pieces.close()
                    write(" [stopped]")
            write("\n\n")

    def tell(self, text: str) -> None:
        """Print something from any thread, between two answers."""
        with self._screen:
            write(text + "\n\n")


def spoken(reply: Iterator[str]) -> Iterator[str]:
    """A reply's pieces, or a note where there are none. Closing this breaks the reply off."""
    empty, thought = True, False
    with closing(reply):
        for piece in reply:
            thought |= isinstance(piece, Thought)
            empty &= isinstance(piece, Thought)
            yield piece
    if empty:
        yield "(a thought without a reply; /settings tokens N allows more)" if thought else "(empty reply)"


def _help(chat: Chat, rest: str) -> Iterable[str]:
    width = 2 + max(len(c.usage) for c in chat.commands.values())
    listed = [f"{c.usage:<{width}}{c.phrase}" for c in chat.commands.values()]
    return ["\n".join([*listed, f"{chat.typing}A message that begins with / is written with //."])]


def _retry(chat: Chat, rest: str) -> Iterable[str]:
    return spoken(chat.dialogue.retry())


def _back(chat: Chat, rest: str) -> Iterable[str]:
    chat.dialogue.back(number(rest or "1", int))
    turns = chat.dialogue.turns
    return [f"back at: {turns[-1].reply}" if turns else "back at the beginning"]


def _state(chat: Chat, rest: str) -> Iterable[str]:
    action, _, name = rest.partition(" ")
    name, folder, dialogue = name.strip(), chat.folder / "dialogues", chat.dialogue
    if action == "import" and name:
        path = folder / f"{name}.pth" if re.fullmatch(r"[\w-]+", name) else Path(name).expanduser()
        dialogue.import_state(path)
        return [IMPORTED.format(path)]
    if action not in ("save", "load", "export") or not re.fullmatch(r"[\w-]+", name):
        what = "/state save NAME, /state load NAME or /state export NAME, with letters, digits, - and _ in NAME"
        raise ValueError(f"write {what}, or /state import FILE")
    if action == "export":
        dialogue.export_state(folder / f"{name}.pth")
        return [f"{folder / name}.pth: the state after {len(dialogue.turns)} turns, for the package rwkv; without text"]
    path = folder / f"{name}.state"
    if action == "save":
        dialogue.save(path)
        return [f"saved {len(dialogue.turns)} turns as {name}"]
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.state"))) or "none"
        raise ValueError(f"no dialogue is saved as {name}; there are: {known}")
    dialogue.load(path)
    return [f"loaded {len(dialogue.turns)} turns; the last reply was: {dialogue.last().reply}"]


def _system(chat: Chat, rest: str) -> Iterable[str]:
    chat.dialogue.system(rest)
    return ["goes before your next message" if chat.dialogue.pending else "no system message before your next message"]


def _set(chat: Chat, rest: str) -> Iterable[str]:
    name, _, value = rest.partition(" ")
    if not name:
        return ["\n".join(f"{name:<20}{s.get()}" for name, s in chat.settings.items())]
    told = ""
    if name in chat.renamed:
        name, told = chat.renamed[name], f"{name} is now {chat.renamed[name]}\n"
    if name not in chat.settings:
        raise ValueError(f"there is no setting {name}; there are: {', '.join(chat.settings)}")
    if value:
        chat.settings[name].set(value.strip())
    return [f"{told}{name} {chat.settings[name].get()}"]


def _quit(chat: Chat, rest: str) -> Iterable[str]:
    chat.done = True
    return ["bye"]


IMPORTED = (
    "{}: your next message goes on from this state. It holds no text: what was said before is not shown, corrections "
    "are learnt without it, and after a correction it stays the state of the model that it was made with"
)
COMMANDS = {
    "help": Command("/help", "list the commands", _help),
    "retry": Command("/retry", "another reply to your last message", _retry),
    "back": Command("/back [N]", "unsay the last turn, or the last N", _back),
    "state": Command("/state save|load|export|import NAME", "keep the conversation; hand its state on", _state),
    "system": Command("/system TEXT", "a system message before your next message", _system),
    "settings": Command("/settings [NAME [VALUE]]", "show or change how replies are sampled", _set),
    "quit": Command("/quit", "leave, as does Ctrl-D", _quit),
}


def _settings(dialogue: Dialogue) -> dict[str, Setting]:
    def sampled(name: str, kind: type) -> Setting:
        def change(value: str) -> None:
            dialogue.sampling = replace(dialogue.sampling, **{name: number(value, kind)})

        return Setting(lambda: getattr(dialogue.sampling, name), change)

    def preset() -> str:
        name = next((name for name, known in PRESETS.items() if known == dialogue.sampling), "none")
        return f"{name}: {described(dialogue.sampling)}"

    def take(name: str) -> None:
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name}; there are: {', '.join(PRESETS)}")
        dialogue.sampling = PRESETS[name]

    found = {"preset": Setting(preset, take)}
    found |= {f.name: sampled(f.name, f.type) for f in fields(Sampling)}
    found["seed"] = Setting(lambda: dialogue.rng.initial_seed(), lambda value: dialogue.reseed(number(value, int)))
    found["tokens"] = Setting(lambda: dialogue.max_new_tokens, lambda value: dialogue.limit(number(value, int)))

    def think(value: str) -> None:
        dialogue.template = replace(dialogue.template, thinking=value)

    if dialogue.template.thinks:
        found["thinking"] = Setting(lambda: dialogue.template.thinking, think)
    return found


def number(text: str, kind: type) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"expected {'a whole number' if kind is int else 'a number'}, found {text!r}") from None


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
