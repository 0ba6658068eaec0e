"""Presets, one file per family of runs.

Each file defines `PRESETS`, names to `spacedrive_jax.config.Config`; `train NAME` finds them by name and
`train --list` shows them all.
"""
