"""Small models to correct, with a rehearsal set of three dialogues."""

import torch
from helpers import random_model

from rwkv_train.feedback import Correction, FeedbackConfig, Learner
from rwkv_train.feedback.curvature import Curvature
from rwkv_train.feedback.decode import Form
from rwkv_train.feedback.rehearsal import RehearsalSet
from rwkv_train.feedback.trainable import localised_names, upper_names
from rwkv_train.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
FORM = Form(BYTES)
CONFIG = FeedbackConfig(
    trainable="localised",
    step_factor=0.5,
    steps=100,
    target_loss=0.1,
    kl_weight=0.01,
    max_kl=1e9,
    contrasts=2,
    rehearsed=2,
)
QUICK = [Correction("sun?", "hot"), Correction("ice?", "cold"), Correction("sea?", "wet")]
ASKED = [("hi you", "hello"), ("a?", "b"), ("2?", "4")]
SUBJECTS = [("hi you", "you"), ("a?", "a"), ("2?", "2")]
DIALOGUES = [[0, *BYTES.encode(f"User: {q}\n\nAssistant: {a}\n\n")] for q, a in ASKED]


def small_model(seed=0, generation="rwkv4"):
    width, first = {"rwkv4": (48, 0), "rwkv7": (96, 2)}[generation]  # not every random model can be taught by so little
    model = random_model(n_embd=width, vocab_size=257, seed=seed + first, generation=generation, head_size=16)
    return model.requires_grad_(False)


def upper_matrices(model, first: int) -> list[str]:
    """Weights of linear layers by the files' names: of the blocks from `first` on and of the head."""
    begins = ("head.", *(f"blocks.{i}." for i in range(first, len(model.blocks))))
    parameters = model.named_parameters()
    return [n for n, p in parameters if p.dim() == 2 and n.endswith(".weight") and n.startswith(begins)]


def rehearsal_set(model) -> RehearsalSet:
    curvature = Curvature.measure(model, upper_names(model), localised_names(model), DIALOGUES)
    return RehearsalSet(model, FORM, DIALOGUES, SUBJECTS, DIALOGUES, curvature)


def open_learner(folder, config=CONFIG, seed=0, generation="rwkv4") -> Learner:
    model = small_model(seed, generation)
    return Learner(model, BYTES, folder / "profile", config=config, rehearsal=rehearsal_set(model))


def old_model():
    """The model of tests/feedback/old_profile: rounded, so that every machine makes the same one."""
    model = random_model(n_embd=32, vocab_size=257)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p * 64).round() / 64)
    return model.requires_grad_(False)
