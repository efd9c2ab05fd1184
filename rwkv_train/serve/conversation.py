"""From messages to tokens: what of a conversation has been read before, and what is to be read now."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from rwkv_train.data.templates import Template
from rwkv_train.models.state import State
from rwkv_train.serve.sessions import Gone, Sessions, Turn, key_of
from rwkv_train.tokenizer import Tokenizer


@dataclass(frozen=True)
class Asked:
    """A reply that is asked for.

    parent: the turn that it follows, None for the first. messages: those since then, and prompt: their ids. read: the
    ids to read after `state`: the prompt alone, or with all that was said before it, and what is written of the reply
    for the model; history: without that. key: of the conversation up to the last reply in it; since: how many of the
    messages come after that. template: as which the reply is written; None for a text that is no reply.
    """

    parent: Turn | None
    messages: list[dict]
    prompt: list[int]
    read: list[int]
    state: State | None
    key: str = ""
    since: int = 0
    template: Template | None = None
    history: tuple[int, ...] = ()

    def key_with(self, reply: str) -> str:
        """The key of the conversation up to a reply to it."""
        return key_of(self.key, self.messages[len(self.messages) - self.since :], reply)

    @property
    def opened(self) -> int:
        """Tokens that are written of the reply for the model."""
        return len(self.read) - len(self.history)

    @property
    def length(self) -> int:
        """Tokens of the conversation up to the reply, read now or before."""
        return (self.parent.length if self.parent else 0) + len(self.prompt)


class Conversations:
    """How conversations are written for a model, and those that are known."""

    def __init__(self, tokenizer: Tokenizer, template: Template, sessions: Sessions):
        self.tokenizer, self.template, self.sessions = tokenizer, template, sessions

    def after(self, turn: Turn, messages: list[dict], version: str, thinking: str | None = None) -> Asked:
        """Messages that follow a known turn, for the model of a version.

        thinking: how a thought is asked for, if not as the template says. Raises ValueError for what is no message, and
        for a thinking that the model was not taught.
        """
        return self._asked(turn, messages, version, turn.key, thinking)

    def whole(self, messages: Sequence[dict], who: str, version: str, thinking: str | None = None) -> Asked:
        """A whole conversation, of which the longest part that is known is not read again.

        who: names what conversations may be known: of one owner and one profile. thinking, and errors: as above.
        """
        for count, key in reversed(_keys(who, messages)[1:]):
            turn = self.sessions.find(key)
            if turn is not None:
                with suppress(Gone):  # then what was sent is read
                    return self.after(turn, list(messages[count:]), version, thinking)
        return self._asked(None, list(messages), version, who, thinking)

    def transcript(self, turn: Turn) -> list[dict]:
        """Messages of a conversation up to a turn's reply, without it, each with the id of its turn."""
        found = []
        for each in self.sessions.before(turn):
            found += [m | {"turn": each.id} for m in each.messages]
            found.append({"role": "assistant", "content": each.reply, "turn": each.id})
        return [*found, *(m | {"turn": turn.id} for m in turn.messages)]

    def context(self, turn: Turn) -> list[int]:
        """Ids before a turn's last message, without the end-of-document token: a `Correction`'s context."""
        earlier = self.sessions.before(turn)
        said = [i for piece in self.template.history(turn.messages[:-1]) for i in self.tokenizer.encode(piece)]
        read = [i for each in earlier for i in each.read]
        return [*read, *self._opening(earlier[-1] if earlier else None), *said][1:]

    def _asked(self, parent: Turn | None, messages: list[dict], version: str, key: str, thinking: str | None) -> Asked:
        template = self.template if thinking is None else replace(self.template, thinking=thinking)
        prompt, opened = (
            [*self._opening(parent), *(i for piece in pieces for i in self.tokenizer.encode(piece))]
            for pieces in (template.prompt(messages, opened=False), template.prompt(messages))
        )
        state = self.sessions.state(parent.id) if parent and parent.version == version else None
        before = [*self.sessions.before(parent), parent] if parent and state is None else []
        earlier = [i for turn in before for i in turn.read]
        said, key = _keys(key, messages)[-1]
        since, history = len(messages) - said, (*earlier, *prompt)
        return Asked(parent, messages, prompt, earlier + opened, state, key, since, template, history)

    def _opening(self, parent: Turn | None) -> list[int]:
        """What comes before messages: the end of the document before, or of a reply that did not end itself."""
        if parent is None:
            return [self.tokenizer.eod]
        return [] if parent.ended else self.tokenizer.encode(self.template.end())


def _keys(key: str, messages: Sequence[dict]) -> list[tuple[int, str]]:
    """(count, key) of the first messages that end with a reply, fewest first; `key`: of what was said before them.

    A reply at the very end is none yet: it is gone on with.
    """
    keys = [(0, key)]
    for count, message in enumerate(messages, 1):
        if message["role"] == "assistant" and count < len(messages):
            said, before = keys[-1]
            keys.append((count, key_of(before, messages[said : count - 1], message["content"])))
    return keys
