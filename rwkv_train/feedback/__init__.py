"""Correcting a model while it is in use: a few gradient steps per correction, journalled, gated and undoable."""

from rwkv_train.feedback.learner import Correction, FeedbackConfig, Learner, Outcome, Reading

__all__ = ["Correction", "FeedbackConfig", "Learner", "Outcome", "Reading"]
