"""The published SpaceDrive code's names: its constructor arguments, its tensors, its checkpoints."""
