"""The checkpoints of a run: folders that are written whole, checked before they are used, and found again.

runs/NAME/checkpoints/step=00000500/ holds what training needs to go on (trainer.ckpt: one file, or DeepSpeed's folder
with model.safetensors beside it), settings.json, which says how it was made, and manifest.json, which names every file
with its size and SHA-256. A folder gets its name when all of it is on the disk.
"""

import hashlib
import json
import math
import re
import shutil
import sys
from pathlib import Path

from rwkv_train.files import replace_file, sync

TRAINER = "trainer.ckpt"
WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"
FACTS = "settings.json"


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step={step:08d}"


def draft(target: Path) -> Path:
    """A folder to write a checkpoint into, which `commit` gives its name. The same on all ranks."""
    return target.with_name(f".{target.name}.tmp")


def commit(target: Path, **facts) -> None:
    """Put the draft of a checkpoint in its place, complete and on the disk. facts: go into its manifest."""
    folder = draft(target)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    found = {str(path.relative_to(folder)): _fingerprint(path) for path in files}
    _write_manifest(folder, {"files": found, **facts})
    sync(folder)
    shutil.rmtree(target, ignore_errors=True)  # of a try that this run has gone back before
    folder.rename(target)
    sync(target.parent)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if all of it is as it was written."""
    try:
        files = _manifest(path)["files"]
        for name, was in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if _fingerprint(path / name) != was:
                return f"{name} is not what was written"
        return None if files else f"{MANIFEST} names no files"
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"


def run_checkpoints(run: str | Path) -> list[Path]:
    """A run's checkpoints, sound or not, oldest first."""
    folders = Path(run).expanduser().glob("checkpoints/step=*")
    steps = {int(match[1]): path for path in folders if (match := re.fullmatch(r"step=([0-9]+)", path.name))}
    return [path for _, path in sorted(steps.items()) if path.is_dir()]


def newest_sound(run: str | Path) -> Path | None:
    """A run's newest sound checkpoint, None if it has none; each that is passed over is told on standard error."""
    for path in reversed(run_checkpoints(run)):
        wrong = verify(path)
        if wrong is None:
            return path
        print(f"{path} is damaged ({wrong}); looking for the one before", file=sys.stderr)
    return None


def step_of(path: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    found = _manifest(path).get("step")
    return int(path.name.rpartition("=")[2]) if found is None else found


def facts_of(path: Path) -> dict | None:
    """What `fit` said of the run when it wrote a checkpoint; None for one that was written before it did."""
    file = path / FACTS
    return json.loads(file.read_bytes()) if file.is_file() else None


def prune(run: Path, keep: int, best: int) -> None:
    """Delete all but the `keep` newest checkpoints and the `best` ones with the lowest validation loss."""
    found = run_checkpoints(run)
    scores = {path: score for path in found if (score := _score(path)) is not None}
    kept = {*found[-keep:], *sorted(scores, key=scores.get)[:best]}
    for path in found:
        if path not in kept:
            shutil.rmtree(path)


def is_best(run: Path, score: float, best: int) -> bool:
    """Whether a validation loss is among the `best` lowest of the checkpoints kept so far; one that is no number never
    is."""
    if not math.isfinite(score):
        return False
    scores = sorted(s for path in run_checkpoints(run) if (s := _score(path)) is not None)
    return best > 0 and (len(scores) < best or score < scores[best - 1])


def _score(path: Path) -> float | None:
    """The validation loss of a checkpoint; None where it has none, or one that is no finite number."""
    try:
        score = _manifest(path).get("val_loss")
    except (ValueError, OSError, AttributeError):
        return None
    return score if isinstance(score, int | float) and math.isfinite(score) else None


def _manifest(path: Path) -> dict:
    return json.loads((path / MANIFEST).read_bytes())


def _write_manifest(folder: Path, content: dict) -> None:
    text = json.dumps(content, indent=1) + "\n"
    replace_file(folder / MANIFEST, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _fingerprint(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
