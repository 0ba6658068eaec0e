"""Losses, optimiser, sharding, checkpoints and the training loop."""
