"""Where the starter model lies, and what belongs to the user."""

from pathlib import Path

import platformdirs


def data_folder(given: str | None) -> Path:
    """Where what belongs to the user is kept."""
    return Path(given or platformdirs.user_data_dir("rwkv_train")).expanduser()


def profile_folder(folder: Path, profile: str | None, model: str | Path) -> Path:
    """Where corrections are kept: under the profile's name, or the model's."""
    path = Path(model).expanduser().resolve()
    return folder / "profiles" / (profile or (path.parent.name if path.stem == "model" else path.stem))
