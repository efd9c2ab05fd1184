"""Asking for values without waiting: on a CPU they are there, on a GPU they come one question late."""

import torch

from rwkv_train.train.answers import Answers


class Copied:
    """An event behind a copy to the host, which says when it was waited for."""

    def __init__(self, waited, about):
        self.synchronize = lambda: waited.append(about)


def test_on_a_cpu_an_answer_is_there_at_once():
    answers = Answers()
    answers.ask(torch.tensor(2.5), about=7)
    assert answers.known() == [(2.5, 7)] and answers.known() == []


def test_on_a_gpu_only_what_is_older_than_the_last_question_is_waited_for():
    answers, waited, given = Answers(), [], []
    for n in range(3):
        answers._asked.append((torch.tensor(n % 2 == 0), Copied(waited, n), n))
        given += answers.known()
    assert given == [(True, 0), (False, 1)] and waited == [0, 1]
    assert answers.known(wait=True) == [(True, 2)] and waited == [0, 1, 2]
