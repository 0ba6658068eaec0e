"""Plans of studies: what `python -m spacedrive_jax study` runs."""
