"""Batches to weights: the loss, the checkpoints and the trainer. Meets `sampling` only through saved weights."""
