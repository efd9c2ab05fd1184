"""Talking with a model: a dialogue, the session around it, its fronts, and the commands that teach.

How a correction is learnt is not known here; see feedback/.
"""

from rwkv_train.chat.command import open_chat

__all__ = ["open_chat"]
