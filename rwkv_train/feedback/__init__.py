"""Correcting a model while it is in use: a few gradient steps per correction, journalled, gated and undoable.

Nothing here reads from or writes to a terminal.
"""

from rwkv_train.feedback.correction import Correction, Outcome, Reading
from rwkv_train.feedback.learner import Learner
from rwkv_train.feedback.settings import FeedbackConfig
from rwkv_train.feedback.sleep import Slept

__all__ = ["Correction", "FeedbackConfig", "Learner", "Outcome", "Reading", "Slept"]
