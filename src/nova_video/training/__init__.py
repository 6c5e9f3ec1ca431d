"""Batches to weights: the loss, the recipes, the checkpoints and the trainer.

It may import `common`, `io`, `model`, `autoencoders`, `sampling`, `fast`, `text`, `pipeline` and `data`.
"""
