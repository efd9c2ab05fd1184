"""A live room by itself: whose messages are taken, and which is next."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_train.chat.room import MINUTE, Message, Room


def test_joiners_stay_in_a_message_and_not_in_a_name():
    room = Room()
    assert room.offer("a\u200dnn: !\u06c1\u200c\u06cc \U0001f469\u200d\U0001f467\x1b", 0.0) == "taken"
    assert room.pick() == Message("ann", "\u06c1\u200c\u06cc \U0001f469\u200d\U0001f467")


def test_which_lines_are_for_the_room():
    room = Room(longest=5, operators=frozenset({"op"}))
    wanted = {
        "a: !hi": "taken",
        " a b :  ! hi ": "taken",
        "a: hi": "not for us",
        "hi": "not for us",
        ": !hi": "not for us",
        "a: !": "empty",
        "a: !123456": "too long",
        "a: !/fix": "not an operator",
        "a: !\x1b[2J\udcff:\t)": "too long",
        "c: !\x1b:\t)\udcff": "taken",
        "abcdef: !a": "too long",
        "op: !/fix": "taken",
    }
    assert {line: room.offer(line, 0.0) for line in wanted} == wanted
    picked = [room.pick() for _ in range(5)]
    assert picked[0] == Message("op", "/fix", command=True)  # operators' commands go first
    assert picked[1:] == [Message("a", "hi"), Message("a b", "hi"), Message("c", ": )"), None]


EVENTS = st.lists(st.one_of(st.none(), st.tuples(st.sampled_from("abc"), st.integers(0, 40))), max_size=60)


@settings(max_examples=100, deadline=None)
@given(EVENTS, st.sampled_from(["fifo", "random", "newest"]), *[st.integers(1, 4)] * 3)
def test_room_policies(events, policy, queue, per_user, rate):
    """Against a list of all that happened: None picks, (user, seconds since the last) offers."""
    room = Room("", policy, queue=queue, per_user=per_user, rate=rate)
    waiting, taken, now = [], [], 0.0
    for number, event in enumerate(events):
        if event is None:
            found = room.pick()
            assert (found is None) == (not waiting)
            if found:
                place = waiting.index((found.user, found.text))
                assert {"fifo": place == 0, "newest": place == len(waiting) - 1, "random": True}[policy]
                waiting.pop(place)
            continue
        user, now = event[0], now + event[1]
        theirs = [w for w in waiting if w[0] == user]
        recent = [t for t, u in taken if u == user and now - t < MINUTE]
        full = len(waiting) == queue
        expected = len(recent) < rate and len(theirs) < per_user and (policy == "newest" or not full)
        assert (room.offer(f"{user}: {number}", now) == "taken") == expected
        if expected:
            waiting = [*waiting[full:], (user, str(number))]
            taken.append((now, user))
        assert len(room) == len(waiting)


def test_rules_change_while_a_room_runs():
    room = Room("", queue=3)
    for user in "abc":
        assert room.offer(f"{user}: x", 0.0) == "taken"
    room.configure(queue=2)
    assert room.offer("d: x", 0.0) == "queue full" and len(room) == 3  # what waits is answered
    room.configure("newest", rate=1)
    assert room.policy == {"pick": "newest", "queue": 2, "per_user": 3, "rate": 1}
    assert room.offer("d: x", 0.0) == "taken" and room.offer("d: y", 0.0) == "too many this minute"
    assert [message.user for message in room.waiting()] == ["d", "c"]  # the oldest went
    for wrong in ({"pick": "oldest"}, {"queue": 0}, {"per_user": -1}, {"queue": 5, "rate": 0}):
        with pytest.raises(ValueError, match=f"{list(wrong)[-1]} must be .*found"):
            room.configure(**wrong)
    assert room.policy == {"pick": "newest", "queue": 2, "per_user": 3, "rate": 1}
    assert room.pick().user == "d" and room.pick().user == "c" and room.waiting() == []


def test_nothing_is_taken_of_whom_a_room_has_muted():
    room = Room("", operators=frozenset({"ann"}))
    for line in ("ann: a", "bob: b", "ann: /help"):
        room.offer(line, 0.0)
    assert room.waiting() == [Message("ann", "/help", True), Message("ann", "a"), Message("bob", "b")]
    room.mute(" a\x1bnn ")
    assert room.muted == {"ann"} and room.waiting() == [Message("bob", "b")]
    assert {room.offer(line, 0.0) for line in ("ann: a", "a\u200dnn: b", "ann: /help")} == {"muted"}
    room.mute("ann", False)
    assert room.offer("ann: a", 0.0) == "taken"
    with pytest.raises(ValueError, match="no name"):
        room.mute("\t")


def test_random_picks_everybody_and_a_seed_repeats_it():
    def order(seed):
        room = Room("", "random", seed=seed)
        for user in "abcdef":
            room.offer(f"{user}: x", 0.0)
        return "".join(room.pick().user for _ in range(6))

    orders = Counter(order(seed) for seed in range(30))
    assert len(orders) > 20 and all(sorted(o) == list("abcdef") for o in orders)
    assert order(1) == order(1) and len({o[0] for o in orders}) == 6
