"""Texts that installed packages carry, and the facts that the starter model is trained on.

No text that others wrote lies here: what is ours are questions, answers' wording and small talk.
"""
