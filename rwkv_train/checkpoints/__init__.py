"""Models in and out of files: weight files, Hugging Face folders, the checkpoints of a run; one opener for them all.

What a file holds is decided here; what a model computes is not.
"""
