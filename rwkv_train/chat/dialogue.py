"""A conversation with a model, without any terminal.

A dialogue is one document, written as chats are in training: the end-of-document token, then turn by turn the
question with the template's marks, and the reply. The state is carried from turn to turn, so nothing is read twice;
every turn keeps the state after it, so going back is exact and costs nothing.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from rwkv_train.checkpoints.states import load_state, save_state
from rwkv_train.checkpoints.weightfile import read_weights, write_pth
from rwkv_train.data.templates import Template
from rwkv_train.files import replace_file
from rwkv_train.generate import Sampling, prefill, random_numbers, stream_tokens
from rwkv_train.generation.reply import Reply
from rwkv_train.models.base import RWKV
from rwkv_train.models.state import State
from rwkv_train.tokenizer import Tokenizer


@dataclass(frozen=True)
class Turn:
    """A question and the reply to it.

    user: the question; system: the system message put before it, if any
    prompt: ids read for it, up to where the reply begins ("...Assistant:")
    state: after prompt and ids, one lane
    reply: the text that was shown; thought: what the model wrote before it, which is not part of the dialogue
    ids: the reply's tokens, which hold exactly that text and, if the model wrote it (`ended`), the end of the turn
    version: of the model that wrote it
    imported: stands for text that nobody knows, of which another program has left the state
    """

    user: str
    system: str | None
    prompt: list[int]
    state: State
    reply: str = ""
    ids: list[int] = field(default_factory=list)
    ended: bool = False
    version: str = ""
    thought: str = ""
    imported: bool = False


class Thought(str):
    """A piece of what a model thinks before it replies."""


class Dialogue:
    """Turns of a conversation, and how the next one is sampled.

    sampling and template may be changed between turns; max_new_tokens: tokens of a reply; stops: texts before which it
    ends. One thread at a time.
    Raises ValueError for a template without users and assistants, or a tokenizer of another model.
    """

    def __init__(
        self,
        model: RWKV,
        tokenizer: Tokenizer,
        template: Template | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        max_new_tokens: int = 500,
        stops: tuple[str, ...] = (),
    ):
        if tokenizer.vocab_size > model.config.vocab_size:
            sizes = f"{tokenizer.vocab_size:,} tokens, the model {model.config.vocab_size:,}"
            raise ValueError(f"the tokenizer knows {sizes}; give the one it was trained with by --tokenizer")
        self.model, self.version, self.tokenizer = model, "", tokenizer
        self.template, self.sampling = template or Template(), sampling or Sampling()
        self.template.prompt([{"role": "user", "content": "-"}])  # has both roles, or says so now
        self.reseed(seed)
        self.stops = stops
        self.limit(max_new_tokens)
        self.turns: list[Turn] = []
        self.pending: str | None = None  # a system message that goes before the next question
        self.functions = ""  # named by the first one
        self._running: Iterator[str] | None = None

    @property
    def ids(self) -> list[int]:
        """Every token of the conversation, from the end-of-document token on."""
        return _ids(self.turns)

    @property
    def state(self) -> State | None:
        """The state after the last turn; None before the first."""
        return self.turns[-1].state if self.turns else None

    def say(self, text: str) -> Iterator[str]:
        """The reply to a message, piece by piece, never breaking a character; of a `Thought` before it, too.

        Nothing happens before the first piece is asked for. The reply ends at the template's end of turn, before one
        of `stops`, at an end of document, or after `max_new_tokens` tokens; closing the iterator breaks it off. Either
        way the state then holds exactly what was shown. Raises ValueError for a message without text.
        """
        self.stop()
        self._prompt(self.turns, text, self.pending, opened=True)  # or says what is wrong with it
        return self._start(self._reply(self.turns, text, self.pending))

    def retry(self) -> Iterator[str]:
        """Another reply to the last message, in place of the last one; only that message is read again."""
        self.stop()
        last = self.last()
        return self._start(self._reply(self.turns[:-1], last.user, last.system))

    def back(self, count: int = 1) -> None:
        """Unsay the last `count` turns. A system message among them waits for the next question again."""
        self.stop()
        if not 1 <= count <= len(self.turns):
            raise ValueError(f"there are {len(self.turns)} turns to go back, not {count}")
        self.pending = self.pending or self.turns[-count].system
        self.turns = self.turns[:-count]

    def system(self, text: str) -> None:
        """Put a system message before the next question; "" for none. ValueError if the template has no such role.

        The first one of a dialogue names the functions, too.
        """
        text = "\n".join(filter(None, (text, self.functions * (not self.turns))))
        self.tokenizer.encode(self._system(text))
        self.pending = text or None

    def reseed(self, seed: int) -> None:
        """Draw from the beginning of another row of random numbers."""
        self.rng = random_numbers(seed)

    def limit(self, max_new_tokens: int) -> None:
        """Let replies have up to `max_new_tokens` tokens."""
        if max_new_tokens < 1:
            raise ValueError(f"a reply must be allowed at least 1 token, found {max_new_tokens}")
        self.max_new_tokens = max_new_tokens

    def stop(self) -> None:
        """Break off a reply that is not finished, as every other method does first."""
        if self._running is not None:
            self._running.close()

    def last(self) -> Turn:
        """The last turn. Raises ValueError if there is none whose text is known."""
        if not self.turns or self.turns[-1].imported:
            raise ValueError("nothing has been said yet")
        return self.turns[-1]

    def prompt_of_last(self) -> list[int]:
        """The exact ids that the last reply answers, from the end-of-document token on."""
        self.stop()
        return [*_ids(self.turns[:-1]), *self.last().prompt]

    def context_of_last(self) -> list[int]:
        """Ids of what stands before the last question, without the end-of-document token; a `Correction`'s context."""
        self.stop()
        earlier, system = self.turns[:-1], self._system(self.last().system or "")
        return [*_ids(earlier), *self._opening(earlier), *self.tokenizer.encode(system)][1:]

    def reread(self, model: RWKV, version: str = "") -> None:
        """Go on with another model of the same tokenizer: it reads the transcript, so every turn's state is its own.

        An imported state stays what it is, as there is nothing to read.
        """
        self.stop()
        turns: list[Turn] = []
        for turn in self.turns:
            if not turn.imported:
                state = prefill(model, turn.prompt + turn.ids, turns[-1].state if turns else None)[1]
                turn = replace(turn, state=state)
            turns.append(turn)
        self.model, self.version, self.turns = model, version, turns

    def save(self, path: str | Path) -> None:
        """Write transcript, states and the place in the random numbers to a file that `load` reads, or keep the old."""
        self.stop()
        self.last()
        turns = [{k: v for k, v in vars(t).items() if k != "state"} for t in self.turns]
        content = {"tokenizer": self.tokenizer.fingerprint, "version": self.version, "pending": self.pending}
        content["turns"] = turns
        lanes = State(*(torch.cat(parts).cpu() for parts in zip(*(t.state for t in self.turns), strict=True)))
        found = {"dialogue": json.dumps(content), "rng": self.rng.get_state(), **lanes._asdict()}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: write_pth(found, temporary))

    def load(self, path: str | Path) -> None:
        """Go on where a saved dialogue was; one of another version of the model is read again.

        Raises ValueError, changing nothing, for a file that does not fit.
        """
        self.stop()
        found = read_weights(Path(path))
        rng = torch.Generator()
        try:
            content = json.loads(found.pop("dialogue"))
            rng.set_state(found.pop("rng"))
            lanes = State(**found)
            turns = [Turn(**turn, state=lanes.select(i)) for i, turn in enumerate(content["turns"])]
            fingerprint, pending, state = content["tokenizer"], content["pending"], turns[-1].state
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError):
            raise ValueError(f"{path} is no saved dialogue; name one that was saved from a chat") from None
        fresh = self.model.empty_state(1)
        fits = all(ours.shape == theirs.shape for ours, theirs in zip(fresh, state, strict=True))
        if fingerprint != self.tokenizer.fingerprint or not fits:
            raise ValueError(f"{path} was held with a model of another size or tokenizer; open it with that one")
        self.turns = [replace(t, state=t.state.to(fresh.wkv)) for t in turns]
        self.rng, self.pending = rng, pending
        if content.get("version") != self.version:
            self.reread(self.model, self.version)

    def export_state(self, path: str | Path) -> None:
        """Write the state in which the next question begins to a file from which the package `rwkv` goes on."""
        self.stop()
        self.last()
        rest = self._opening(self.turns)
        state = prefill(self.model, rest, self.state)[1] if rest else self.state
        save_state(state, path, self.model.dtype)

    def import_state(self, path: str | Path) -> None:
        """Go on from a state that `export_state` or `rwkv` has left, at the beginning of a question.

        What was said before it is unknown, so that there is nothing to retry, to correct, or to read again with another
        model. Raises ValueError, changing nothing, for a file that does not fit.
        """
        self.stop()
        state, about = load_state(path, self.model), f"(the state of {Path(path).name})"
        self.turns, self.pending = [Turn("", None, [self.tokenizer.eod], state, about, ended=True, imported=True)], None

    def _start(self, reply: Iterator[str]) -> Iterator[str]:
        self._running = reply
        return reply

    def _reply(self, turns: list[Turn], user: str, system: str | None) -> Iterator[str]:
        """Ask after `turns`, which then are the dialogue's, and stream the reply."""
        model, before = self.model, turns[-1].state if turns else None
        prompt, opened = (self._prompt(turns, user, system, opened) for opened in (False, True))
        logits, state = prefill(model, prompt, before)
        asked = Turn(user, system, prompt, state, version=self.version)
        self.turns, self.pending = [*turns, asked], None
        if opened[: len(prompt)] != prompt:  # a token holds the end of one and the beginning of the other
            logits, state = prefill(model, opened, before)
        elif more := opened[len(prompt) :]:
            logits, state = prefill(model, more, state)
        reply = Reply(self.tokenizer, self.template, asked.state, self.stops)
        stop = frozenset([self.tokenizer.eod])
        try:
            for token, after in stream_tokens(model, logits, state, self.sampling, self.max_new_tokens, stop, self.rng):
                thought, piece = len(reply.thought), reply.push(token, lambda after=after: after)
                yield from filter(None, (Thought(reply.thought[thought:]), piece))
                if reply.done:
                    break
            thought, piece = len(reply.thought), reply.finish()
            yield from filter(None, (Thought(reply.thought[thought:]), piece))
        finally:
            ids, rest, state = reply.settle()
            if rest := self.tokenizer.encode(rest):
                state = prefill(model, rest, state)[1]
            found = {"reply": reply.shown, "thought": reply.thought, "ended": reply.ended}
            self.turns[-1] = replace(asked, state=state, ids=ids + rest, **found)

    def _prompt(self, turns: list[Turn], user: str, system: str | None, opened: bool) -> list[int]:
        """Ids that ask for a reply after `turns`; opened: with what is written of it for the model."""
        messages = [{"role": "system", "content": system}] if system else []
        pieces = self.template.prompt([*messages, {"role": "user", "content": user}], opened=opened)
        return [*self._opening(turns), *(i for piece in pieces for i in self.tokenizer.encode(piece))]

    def _opening(self, turns: list[Turn]) -> list[int]:
        """What comes before a question: the end of the document before, or of a reply that did not end itself."""
        if not turns:
            return [self.tokenizer.eod]
        return [] if turns[-1].ended else self.tokenizer.encode(self.template.end())

    def _system(self, text: str) -> str:
        """A system message as the template writes it; nothing for none, also where there is no such role."""
        messages = [{"role": "system", "content": text}] if text else []
        return "".join(self.template.history(messages))


def _ids(turns: list[Turn]) -> list[int]:
    return [i for turn in turns for i in (*turn.prompt, *turn.ids)]
