"""Where what belongs to the user lies."""

import os
import tempfile
from pathlib import Path

import platformdirs


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


def profile_folder(folder: Path, profile: str | None, model: str | Path) -> Path:
    """Where corrections are kept: under the profile's name, or the model's."""
    path = Path(model).expanduser().resolve()
    return folder / "profiles" / (profile or (path.parent.name if path.stem == "model" else path.stem))
