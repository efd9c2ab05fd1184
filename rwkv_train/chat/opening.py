"""Where what belongs to the user lies, and opening it."""

import os
import sys
import tempfile
from pathlib import Path

import platformdirs

from rwkv_train.checkpoints.names import called
from rwkv_train.checkpoints.opener import Opened, open_model
from rwkv_train.feedback import Learner
from rwkv_train.feedback.journal import read
from rwkv_train.feedback.profile import OtherModel
from rwkv_train.models.base import RWKV


def data_folder(given: str | None) -> Path:
    """Where what belongs to the user is kept; made if it is not there. ValueError where nothing can be written."""
    folder = Path(os.path.expanduser(given or platformdirs.user_data_dir("rwkv_train")))
    try:
        if folder.parts[:1] == ("~",):
            raise OSError("no home folder is known")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(
            f"nothing can be kept in {folder} ({error}); name a folder to write to, with --folder"
        ) from None


def corrected(name: str | Path, profile: str, folder: str | None) -> RWKV:
    """The model that a profile leaves, in the number format in which it was begun. ValueError if there is none."""
    kept = data_folder(folder)
    journal = kept / "profiles" / profile / "journal.jsonl"
    if not journal.is_file():
        known = ", ".join(sorted(path.parent.name for path in kept.glob("profiles/*/journal.jsonl"))) or "none"
        raise ValueError(f"{kept} has no profile {profile}; there are: {known}")
    begun = next(iter(read(journal)), {})
    with open_profile(open_model(name, dtype=begun.get("dtype", "fp32")), kept, profile, name, None) as learner:
        return learner.model


def open_profile(opened: Opened, folder: Path, profile: str | None, name: str | Path, memory: float | None) -> Learner:
    """A profile in a folder: of that name, or else of the model's.

    name: what the model was opened as. memory: GB (2^30 bytes) that corrections may take, None as many as there are.
    Where the profile of the model's name belongs to another model, one beside it is opened, and that is said. Raises
    ValueError if it was named. What was received and not learnt waits.
    """
    if profile is not None and (profile in ("", ".", "..") or Path(profile).name != profile):
        raise ValueError(f"--profile must be a plain name, found {profile!r}; --folder says where profiles are kept")
    if memory is not None and not memory > 0:
        raise ValueError(f"--memory must be above 0 GB, found {memory}; leave it out for most of the device's")
    model, tokenizer, template = opened
    most = None if memory is None else int(memory * 2**30)
    usual = folder / "profiles" / (profile or called(name))
    try:
        return Learner(model, tokenizer, usual, template, recover=False, memory=most)
    except OtherModel as error:
        if profile:
            raise
        ours = usual.with_name(f"{usual.name}-{error.base[:8]}")
        print(f"{error}. Corrections of this one are kept in {ours}", file=sys.stderr)
    return Learner(model, tokenizer, ours, template, recover=False, memory=most)
