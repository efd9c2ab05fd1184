"""The live room's one dialogue: asked like any response, kept among the conversations, found again after a restart."""

import asyncio
import sys
from collections import deque
from dataclasses import dataclass

from rwkv_train.chat.room import Message
from rwkv_train.feedback import Correction
from rwkv_train.serve.conversation import Asked
from rwkv_train.serve.errors import ApiError
from rwkv_train.serve.schemas import TextRequest
from rwkv_train.serve.service import Running, Service
from rwkv_train.serve.sessions import Turn
from rwkv_train.serve.tokens import Rights

OWNER = Rights("the room", talk=True)  # no token can have a name with a space
SHOWN = 50  # turns that newcomers see
BUSY_SECONDS = 0.5  # until a full server is asked again


@dataclass(eq=False)
class Now:
    """Whose turn it is. reply: so far; running: None before it has begun; skipped: to be broken off."""

    message: Message
    reply: str = ""
    running: Running | None = None
    skipped: bool = False

    @property
    def said(self) -> dict:
        return {"user": self.message.user, "text": self.message.text}


class RoomDialogue:
    """What was said in the room.

    profile: the model that answers. transcript: the last turns, {"user", "text", "reply", "id"}, as they are shown; the
    model is told no names. last: the turn that the next one follows.
    """

    def __init__(self, service: Service, profile: str):
        self.service, self.profile = service, profile
        self.transcript: deque[dict] = deque(maxlen=SHOWN)
        self.last: Turn | None = None
        self._kept: str | None = None  # id of the last turn that is on the disk
        self._place = f"{OWNER.name}, {profile}"

    def load(self) -> None:
        """Find the dialogue. Where the last reply was not kept, as after a crash, it ends with the one before."""
        sessions = self.service.sessions
        place = sessions.get(self._place, OWNER.name)
        ids = [place.parent, place.answer["before"]] if place else []
        turn = next((turn for id in ids if id and (turn := sessions.get(id, OWNER.name))), None)
        self.last, self._kept = turn, turn and turn.id
        found: list[dict] = []
        while turn and len(found) < SHOWN:
            found.append({name: turn.answer[name] for name in ("user", "text")} | {"reply": turn.reply, "id": turn.id})
            found += reversed(turn.answer.get("earlier", []))
            turn = sessions.get(turn.parent, OWNER.name) if turn.parent else None
        self.transcript.extend(reversed(found[:SHOWN]))

    async def ask(self, now: Now) -> Running | None:
        """Ask for a reply; None if it was skipped before that. ApiError, ValueError for what cannot be answered.

        Where the dialogue is too long to be read again, as after a correction, only its last turns are.
        """
        last, earlier = self.last, self._lately()
        asked = [_question(now.message.text)]

        def find(version: str) -> Asked:
            if last:
                return self.service.conversations.after(last, asked, version)
            who = self.service.who(OWNER, self.profile)
            return self.service.conversations.whole([*_messages(earlier), *asked], who, version)

        while not now.skipped:
            answer = now.said if last else now.said | {"earlier": earlier}
            most = self.service.most(None)
            try:
                running = await self.service.reply(
                    self.profile, find, TextRequest(), OWNER, "room_", most, answer=answer
                )
            except ApiError as error:
                if error.status == 503:
                    await asyncio.sleep(BUSY_SECONDS)
                    continue
                if error.code != "context_length_exceeded" or not (last or earlier):
                    raise
                last, earlier = None, earlier if last else []
            except ValueError:  # a turn before could not be kept, as on a full disk
                if not last:
                    raise
                last = None
            else:
                await self._point(running)
                return running
        return None

    def ended(self, now: Now, running: Running) -> dict:
        """Go on from a reply that ended; what of it is shown."""
        self.last = running.turns[0]
        if not running.note:
            self._kept = self.last.id
        self.transcript.append(now.said | {"reply": self.last.reply, "id": self.last.id})
        return self.transcript[-1]

    def correction(self, answer: str, id: str | None) -> tuple[Correction, str]:
        """(that the answer is right in place of a reply, the reply's id). id: None for the last. ValueError if there is
        none."""
        turn = self.service.sessions.get(id, OWNER.name) if id else self.last
        if turn is None:
            raise ValueError("there is no such reply in this room" if id else "nothing was answered in this room yet")
        context = tuple(self.service.conversations.context(turn)[-self.service.config.prompt_tokens :])
        rejected = turn.reply if turn.reply and turn.reply != answer else None
        return Correction(turn.messages[-1]["content"], answer, context, rejected), turn.id

    async def _point(self, running: Running) -> None:
        """Keep where the dialogue is, before its next turn is kept: in a turn of a fixed name that is none."""
        before = {"before": self._kept}
        place = Turn(
            self._place, running.ids[0], OWNER.name, self._place, self.profile, running.version, [], [], answer=before
        )
        try:
            await asyncio.to_thread(self.service.sessions.add, place, None)
        except OSError as error:
            print(f"after a restart the room goes on from an earlier turn: {error}", file=sys.stderr)

    def _lately(self) -> list[dict]:
        """The last turns, as many as can surely be read, and leave room to go on."""
        found, left = [], self.service.config.prompt_tokens // 2
        for turn in reversed(self.transcript):
            left -= 64 + sum(len(message["content"].encode()) for message in _messages([turn]))  # 64: names of roles
            if left < 0:
                break
            found.append(turn)
        return found[::-1]


def _question(text: str) -> dict:
    """As in a chat, a message that begins with a slash is typed with two."""
    return {"role": "user", "content": text[1:] if text.startswith("//") else text}


def _messages(turns: list[dict]) -> list[dict]:
    """Those of shown turns; what was not answered is left out, as no message may be empty."""
    answered = [turn for turn in turns if turn["reply"].strip()]
    return [m for t in answered for m in (_question(t["text"]), {"role": "assistant", "content": t["reply"]})]
