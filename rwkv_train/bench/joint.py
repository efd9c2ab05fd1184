"""All corrections learnt together, again and again, on the same model by the same recipe: what those that come one
after another could be expected to reach."""

from dataclasses import asdict, replace

import torch

from rwkv_train.bench.correction_cases import Case
from rwkv_train.bench.corrections import Protocol, Tick
from rwkv_train.feedback.correction import Received
from rwkv_train.feedback.lesson import Lesson, lesson_of
from rwkv_train.feedback.settings import FeedbackConfig
from rwkv_train.feedback.steps import take_steps
from rwkv_train.models.base import RWKV

TOGETHER = 16  # corrections of one step
STEPS = 4  # at most, on the same corrections
EPOCHS = 20  # at most
QUIET = 4  # epochs one after another without a step, as each reads other examples
SHARE = 4  # of what a correction keeps, so much is read in each epoch, in turn


def learnt_together(protocol: Protocol, config: FeedbackConfig, cases: list[Case], seed: int, tick: Tick) -> RWKV:
    """The base after epochs over all cases, until nothing is left to learn. tick: called for each case once.

    Each correction's lesson is that of the recipe, as if it were the only one. An epoch reads the question alone, one
    of the other examples and a share of what is kept, others each time.
    """
    base, lessons = protocol.base, []
    for number, case in enumerate(cases, 1):
        received = Received(number, protocol.correction(case, seed), asdict(config))
        lessons.append(lesson_of(received, [], [], base, protocol.rehearsal))
        tick()
    lessons = _agreeing(lessons)
    rng, model = torch.Generator().manual_seed(seed), base
    config = replace(config, steps=STEPS, extra=0)
    quiet = 0
    for epoch in range(EPOCHS):
        taken = 0
        for some in torch.randperm(len(lessons), generator=rng).split(TOGETHER):
            lesson = _read_in(epoch, [lessons[i] for i in some])
            model, steps = take_steps(model, lesson, protocol.rehearsal.curvature, config)
            taken += steps
        quiet = 0 if taken else quiet + 1
        if quiet == QUIET:
            break
    return model


def _read_in(epoch: int, lessons: list[Lesson]) -> Lesson:
    """What an epoch reads of some lessons."""
    others = [lesson.new[1:] for lesson in lessons]
    new = [lesson.new[0] for lesson in lessons] + [some[epoch % len(some)] for some in others if some]
    return Lesson(new, anchored=[kept for lesson in lessons for kept in lesson.anchored[epoch % SHARE :: SHARE]])


def _agreeing(lessons: list[Lesson]) -> list[Lesson]:
    """The lessons, none of which keeps or teaches another answer to a question that one of them is about."""
    prompts = [tuple(lesson.new[0].ids[: -lesson.new[0].answer]) for lesson in lessons]
    lengths = {len(prompt) for prompt in prompts}
    agreeing = []
    for lesson, own in zip(lessons, prompts, strict=True):
        taught = set(prompts) - {own}

        def about_another(ids: list[int], taught=taught) -> bool:
            return any(tuple(ids[:n]) in taught for n in lengths)

        new = [example for example in lesson.new if not about_another(example.ids)]
        anchored = [(ids, model) for ids, model in lesson.anchored if not about_another(ids)]
        agreeing.append(replace(lesson, new=new, anchored=anchored))
    return agreeing
