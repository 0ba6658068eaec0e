"""Frames, cameras, patch depth and unprojection."""
