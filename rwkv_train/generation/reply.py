"""A reply while it is written: tokens come in, text that can be shown goes out."""

import codecs
from collections.abc import Callable

from rwkv_train.models.state import State
from rwkv_train.tokenizer import Tokenizer


class Reply:
    """A reply as its tokens come in: what of it can be shown, and the tokens and state that hold just that.

    It ends with the text `end`, which belongs to it, or before one of the texts `stop`, which do not. White space at
    both ends is never shown, and held back until something follows it, as is what may become an end, or a character
    some of whose bytes are missing. keeps_space: of a text that is no message, white space is shown.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end: str,
        state: State | None = None,
        stop: tuple[str, ...] = (),
        keeps_space: bool = False,
    ):
        """state: before its first token, or None if nobody knows it; then `settle` may not know one either."""
        self._tokenizer, self._end, self._keeps_space = tokenizer, end, keeps_space
        self._ends = [text for text in (end, *stop) if text]
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._text, self._ids = "", []
        self._length = 0  # characters of the text that belong to the reply as far as it is shown
        self._kept: tuple[int, int, State | None] = (0, 0, state)  # tokens and characters, nothing of them held back
        self.shown, self.ended, self.stopped = "", False, False

    @property
    def done(self) -> bool:
        """It met its end, or a stop."""
        return self.ended or self.stopped

    def push(self, token: int, state: Callable[[], State], following: int | None = None) -> str:
        """The piece of text that can be shown now that `token` is there.

        state(): after that token; not asked for where `following`, the next token if that is known, will hold nothing
        back, because then a later state serves as well.
        """
        self._ids.append(token)
        self._text += self._utf8.decode(self._tokenizer.decode_bytes([token]))
        at, end = min(((self._text.find(end), end) for end in self._ends if end in self._text), default=(-1, ""))
        self.ended = at >= 0 and end == self._end
        self.stopped = at >= 0 and not self.ended
        shown = at if self.done else self._complete(self._text)
        self._length = at + len(end) if self.ended else shown
        if self._length == len(self._text) and not self._utf8.getstate()[0]:
            ask = self.done or following is None or self._holds(following)
            self._kept = (len(self._ids), self._length, state() if ask else None)
        before, self.shown = len(self.shown), self._cut(self._text[:shown])
        return self.shown[before:]

    def finish(self) -> str:
        """The last piece: what was held back and may be shown, now that no end can follow any more."""
        if self.done:
            return ""
        if self._keeps_space:
            self._text += self._utf8.decode(b"", final=True)
        before, self.shown = len(self.shown), self._cut(self._text)
        self._length = len(self._text) if self._keeps_space else len(self._text.rstrip())
        return self.shown[before:]

    def settle(self, now: State | None = None) -> tuple[list[int], str, State | None]:
        """(ids whose every character belongs to the reply, the text that belongs to it beyond them, state between).

        now: after the last token, for where a later state serves as well.
        """
        count, characters, state = self._kept
        if state is None and count == len(self._ids):
            state = now
        return self._ids[:count], self._text[characters : self._length], state

    def _holds(self, token: int) -> bool:
        """Whether something would be held back after another token, or the reply would end with it."""
        data = self._tokenizer.decode_bytes([token])
        text = self._text + data.decode(errors="ignore")
        half = len(text.encode()) < len(self._text.encode()) + len(data)
        return half or self._complete(text) < len(text) or any(end in text for end in self._ends)

    def _complete(self, text: str) -> int:
        """How many characters are sure to be text of the reply."""
        held = 0
        for end in self._ends:
            longest = min(len(end) - 1, len(text))
            held = max(held, next(n for n in range(longest, -1, -1) if text.endswith(end[:n])))
        return len(text) - held if self._keeps_space else len(text[: len(text) - held].rstrip())

    def _cut(self, text: str) -> str:
        return text if self._keeps_space else text.strip()
