"""Small models to correct, with a rehearsal set of three dialogues."""

from dataclasses import replace

import torch
from helpers import random_model
from pytest import MonkeyPatch

import rwkv_train.feedback.decode as decode_module
import rwkv_train.feedback.gate as gate_module
import rwkv_train.feedback.learner as learner_module
from rwkv_train.feedback import Correction, FeedbackConfig, Learner
from rwkv_train.feedback.correction import example_of
from rwkv_train.feedback.curvature import Curvature
from rwkv_train.feedback.decode import Form
from rwkv_train.feedback.gate import Verdict
from rwkv_train.feedback.lesson import Lesson
from rwkv_train.feedback.rehearsal import RehearsalSet
from rwkv_train.feedback.steps import take_steps
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
    paraphrases=0,
    contrasts=2,
    rehearsed=2,
)
QUICK = [Correction("sun?", "hot"), Correction("ice?", "cold"), Correction("sea?", "wet")]
ASKED = [("hi you", "hello"), ("a?", "b"), ("2?", "4")]
QUESTIONS = [question for question, _ in ASKED]
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
    return RehearsalSet(model, FORM, DIALOGUES, QUESTIONS, DIALOGUES, curvature)


def open_learner(folder, config=CONFIG, seed=0, generation="rwkv4") -> Learner:
    model = small_model(seed, generation)
    return Learner(model, BYTES, folder / "profile", config=config, rehearsal=rehearsal_set(model))


def be_careless(patched: MonkeyPatch) -> None:
    """Let answers be learnt, with the earlier ones, in two steps, and all be accepted; replies have four tokens.

    What was taken along and protected is always the same.
    """

    def lesson(received, earlier, committed, model, rehearsal):
        new, *replayed = (example_of(it.item, rehearsal.form) for it in (received, *earlier))
        return Lesson([new], replayed, paraphrases=["one more?"], contrasts=["near?", "nearer?"], reply=[1])

    def accepted(item, before, whole, answer, *rest):
        return Verdict(True, whole, 1.0, 0.0, "", answer)

    patched.setattr(learner_module, "lesson_of", lesson)
    patched.setattr(
        learner_module,
        "take_steps",
        lambda model, lesson, _, config, tick: take_steps(
            model, lesson, None, replace(config, trainable="localised", steps=2), tick
        ),
    )
    patched.setattr(gate_module, "gate", accepted)
    patched.setattr(decode_module, "MAX_REPLY", 4)
    patched.setattr(RehearsalSet, "kept", lambda path, base, form, *settings: rehearsal_set(base))


def old_model():
    """The model of tests/feedback/old_profile: rounded, so that every machine makes the same one."""
    model = random_model(n_embd=32, vocab_size=257)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p * 64).round() / 64)
    return model.requires_grad_(False)
