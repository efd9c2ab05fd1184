"""Kill a process that learns at random moments and see that nothing is lost.

    python tests/tools/kill_learner.py [MOMENTS]

Every process goes on with the profile that the last one left. After each kill: whatever was acknowledged is there, the
weights are those of a replay from the journal alone, and so are the weights after an undo.
"""

import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from feedback_toys import open_learner
from tqdm import tqdm

from rwkv_train.feedback import Correction, Reading

MOST = 3  # corrections that count at a time
LONGEST = 2.5  # seconds from the first sign of life to the kill


def session(folder: Path) -> None:
    """Learn and undo until killed, telling what is acknowledged."""
    learner, rng = open_learner(folder), random.Random()
    print("ready", flush=True)
    while True:
        if len(learner.active()) >= MOST:
            print("undone", *learner.undo(rng.randint(1, MOST)), flush=True)
        word = "".join(rng.choices("abcdefgh", k=4))
        what = Reading(word * 60) if rng.random() < 0.2 else Correction(f"{word}?", word[::-1])
        learner.learn(what, received=lambda number: print("received", number, flush=True))


def kill(folder: Path, rng: random.Random) -> None:
    """Start a session on a folder, kill it at a random moment, and check what it left."""
    before = open_learner(folder)
    known = [r["id"] for r in before.active()]
    before.close()
    child = subprocess.Popen([sys.executable, __file__, "--session", str(folder)], stdout=subprocess.PIPE, text=True)
    lines = [child.stdout.readline()]
    try:
        child.wait(rng.uniform(0, LONGEST))
    except subprocess.TimeoutExpired:
        child.kill()
    lines += child.stdout.read().splitlines(keepends=True)
    assert child.wait() == -9 and lines[0] == "ready\n", f"the session ended by itself: {child.returncode}, {lines}"

    words = [line.split() for line in lines if line.endswith("\n")]
    acknowledged = known + [int(w) for kind, *rest in words if kind == "received" for w in rest]
    undone = {int(w) for kind, *rest in words if kind == "undone" for w in rest}
    hashes = []
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder / "profile", Path(copy) / "profile")
        shutil.rmtree(Path(copy) / "profile" / "snapshots", ignore_errors=True)
        for place in (folder, Path(copy)):
            learner = open_learner(place)
            records = {r["id"]: r for r in learner.journal.records}
            gone = {i for r in learner.journal.records if r["kind"] == "undone" for i in r["of"]}
            rejected = {r["of"] for r in learner.journal.records if r["kind"] == "committed" and not r["accepted"]}
            active = [r["id"] for r in learner.active()]
            assert all(records[i]["kind"] == "received" for i in acknowledged) and undone <= gone
            assert set(acknowledged) - gone - rejected <= set(active)
            hashes.append((active, learner.weights))
            if active and place == Path(copy):
                learner.undo()
                hashes.append((active[:-1], learner.weights))
            learner.close()
        if hashes[0][0]:  # undone with the help of snapshots
            shutil.rmtree(Path(copy) / "profile")
            shutil.copytree(folder / "profile", Path(copy) / "profile")
            learner = open_learner(Path(copy))
            learner.undo()
            hashes.append((hashes[0][0][:-1], learner.weights))
            learner.close()
            assert hashes[2] == hashes[3]
    assert hashes[0] == hashes[1]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--session"]:
        session(Path(sys.argv[2]))
    moments, rng = int((sys.argv[1:] or ["100"])[0]), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        for _ in tqdm(range(moments), unit="kill"):
            kill(Path(folder), rng)
        learner = open_learner(Path(folder))
        acknowledged = sum(r["kind"] == "received" for r in learner.journal.records)
        learner.close()
    print(f"killed at {moments} random moments: all {acknowledged} corrections there, weights and undo identical")
