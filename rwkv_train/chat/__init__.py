"""Talking with a model: a dialogue, the terminal, the live room, and the commands typed there.

How a correction is learnt is not known here; see feedback/.
"""
