"""Open-loop scores: protocols, rasters, metrics, baselines and the reading of prediction files."""
