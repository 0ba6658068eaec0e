"""Metric depth of the visual tokens: where it comes from is a choice of the config."""
