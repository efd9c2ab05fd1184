"""What a chat, a file of corrections and a benchmark of them open: a model with its form, and folders."""

from pathlib import Path

import platformdirs
import torch

from rwkv_train.checkpoints.modelfile import load_model, parts_of
from rwkv_train.commands import tokenizer_of
from rwkv_train.data.templates import Template
from rwkv_train.feedback.decode import Form
from rwkv_train.models.base import RWKV

STARTER = Path(__file__).parents[2] / "data" / "starter"


def open_model(model: str | Path, tokenizer: str | None, template: str | None) -> tuple[RWKV, Form]:
    """A model in float32, and how questions are written for it."""
    path = weights_in(model)
    found = load_model(path, dtype=torch.float32)
    return found, Form(tokenizer_of(str(path), tokenizer, found.config.vocab_size), template_of(path, template))


def template_of(path: Path, given: str | None = None) -> Template:
    """The template that was given, or lies beside a model as template.yaml, or the World models'."""
    path = parts_of(path)[0]
    beside = (path.parent if path.is_file() else path) / "template.yaml"
    found = given or (beside if beside.is_file() else None)
    return Template.load(found) if found else Template()


def weights_in(model: str | Path) -> Path:
    """A model's path; of a folder with model.pth, as the starter model's, that file."""
    path = Path(model).expanduser()
    return path / "model.pth" if (path / "model.pth").is_file() else path


def data_folder(given: str | None) -> Path:
    """Where what belongs to the user is kept."""
    return Path(given or platformdirs.user_data_dir("rwkv_train")).expanduser()


def profile_folder(folder: Path, profile: str | None, model: str | Path) -> Path:
    """Where corrections are kept: under the profile's name, or the model's."""
    path = Path(model).expanduser().resolve()
    return folder / "profiles" / (profile or (path.parent.name if path.stem == "model" else path.stem))
