"""Closed-loop scores of Bench2Drive result files."""
