"""Weights from and to other frameworks: the commands `import-weights` and `export-weights`."""
