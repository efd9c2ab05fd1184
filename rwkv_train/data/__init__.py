"""Sources -> records -> chat format -> tokens -> store -> lanes -> batches.

Only this room imports datasets. Nothing here knows of models.
"""
