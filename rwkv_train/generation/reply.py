"""A reply while it is written: tokens come in, text that can be shown goes out."""

import codecs
from collections.abc import Callable

from rwkv_train.data.templates import THINK, THOUGHT, Template, TurnEnd, split_thought
from rwkv_train.models.state import State
from rwkv_train.tokenizer import Tokenizer


class Reply:
    """A reply as its tokens come in: what of it can be shown, and the tokens and state that hold just that.

    It ends as the template tells, or before one of the texts `stop`. White space at both ends is never shown, and held
    back until something follows it, as is what may become an end, or a character some of whose bytes are missing. Of a
    text that is no message, without a template, white space is shown.

    shown: the reply so far; thought: what goes before it, which is no part of a conversation once it has been said.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template | None,
        state: State | None = None,
        stop: tuple[str, ...] = (),
    ):
        """state: before the reply, without what the template writes of it for the model, or None if nobody knows it;
        then `settle` may not know one either."""
        self._tokenizer, self._template, self._keeps_space = tokenizer, template, template is None
        self._opening, self._begin = template.opening if template else "", state
        self._end = template.turn_end() if template else TurnEnd("")
        self._stops = stop
        self._ends = [*self._end.marks, *stop]
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._text, self._ids = "", []
        self._length = 0  # characters of the text that belong to the reply as far as it is shown
        self._kept: tuple[int, int, State | None] = (0, 0, state)  # tokens and characters, nothing of them held back
        self.shown, self.thought, self.ended, self.stopped = "", "", False, False

    @property
    def done(self) -> bool:
        """It met its end, or a stop."""
        return self.ended or self.stopped

    @property
    def apart(self) -> bool:
        """Whether the model has written, or read, something else than what the history has of the reply."""
        begun = self._text.strip()
        return bool(self._opening) or (self._thinks and (begun.startswith(THINK) or self._may_think(begun)))

    @property
    def _thinks(self) -> bool:
        return self._template is not None and self._template.thinks

    def _may_think(self, begun: str) -> bool:
        """Whether a thought may begin with this, of which nothing has been shown yet."""
        return not self.shown and begun != "" and THINK.startswith(begun)

    def _begins(self, text: str) -> int:
        """Where in what the model has written its reply begins, after a thought; the end, as long as none has."""
        whole = self._opening + text
        before = len(whole) - len(whole.lstrip())
        if not self._thinks or not (whole[before:].startswith(THINK) or THINK.startswith(whole[before:])):
            return 0
        closed = whole.find(THOUGHT, before)
        if closed < 0:
            return len(text)
        rest = whole[closed + len(THOUGHT) :]
        return len(whole) - len(rest.lstrip()) - len(self._opening)

    def _ending(self, text: str) -> tuple[int, str]:
        """(where in what the model has written its reply ends, by which text); -1 where it does not."""
        begin = self._begins(text)
        places = [(text.find(end), end) for end in self._end.marks]
        places += [(text.find(stop, begin), stop) for stop in self._stops]
        return min((place for place in places if place[0] >= 0), default=(-1, ""))

    def push(self, token: int, state: Callable[[], State], following: int | None = None) -> str:
        """The piece of text that can be shown now that `token` is there.

        state(): after that token; not asked for where `following`, the next token if that is known, will hold nothing
        back, because then a later state serves as well.
        """
        self._ids.append(token)
        self._text += self._utf8.decode(self._tokenizer.decode_bytes([token]))
        at, end = self._ending(self._text)
        self.ended = at >= 0 and end in self._end.marks
        self.stopped = at >= 0 and not self.ended
        shown = at if self.done else self._complete(self._text)
        self._length = at + len(self._end.text) if self.ended else shown
        if self._length == len(self._text) and not self._utf8.getstate()[0]:
            ask = self.done or following is None or self._holds(following)
            self._kept = (len(self._ids), self._length, state() if ask else None)
        return self._show(self._text[:shown], last=self.done)

    def finish(self) -> str:
        """The last piece: what was held back and may be shown, now that no end can follow any more."""
        if self.done:
            return ""
        if self._keeps_space:
            self._text += self._utf8.decode(b"", final=True)
        self._length = len(self._text) if self._keeps_space else len(self._text.rstrip())
        return self._show(self._text, last=True)

    def settle(self, now: State | None = None) -> tuple[list[int], str, State | None]:
        """(ids whose every character belongs to the reply, the text that belongs to it beyond them, state between).

        now: after the last token, for where a later state serves as well. Where there was a thought, the ids are none
        and the state is that before the reply, which is to be read again without it.
        """
        if self.apart:
            return [], self._template.written(self.shown, self.ended), self._begin
        count, characters, state = self._kept
        if state is None and count == len(self._ids):
            state = now
        return self._ids[:count], self._text[characters : self._length], state

    def _holds(self, token: int) -> bool:
        """Whether something would be held back after another token, or the reply would end with it."""
        data = self._tokenizer.decode_bytes([token])
        text = self._text + data.decode(errors="ignore")
        half = len(text.encode()) < len(self._text.encode()) + len(data)
        return half or self._complete(text) < len(text) or self._ending(text)[0] >= 0

    def _complete(self, text: str) -> int:
        """How many characters are sure to be text of the reply."""
        held = 0
        for end in self._ends:
            longest = min(len(end) - 1, len(text))
            held = max(held, next(n for n in range(longest, -1, -1) if text.endswith(end[:n])))
        return len(text) - held if self._keeps_space else len(text[: len(text) - held].rstrip())

    def _show(self, text: str, last: bool) -> str:
        """Take in all text that is sure to be of the reply; what of it is new to be shown. last: no more will come."""
        before, said = len(self.shown), text
        if self._thinks:
            whole = (self._opening + text).lstrip()
            self.thought, said = split_thought(whole)
            if whole == THINK[:-1] or (not last and THINK.startswith(whole)):  # it may become one
                said = ""
            elif not (said or last or THOUGHT in whole):
                held = next(n for n in range(len(THOUGHT) - 1, -1, -1) if self.thought.endswith(THOUGHT[:n]))
                self.thought = self.thought[: len(self.thought) - held].rstrip()
        self.shown = said if self._keeps_space else said.strip()
        return self.shown[before:]
