"""From a checkpoint to trajectories and text."""
