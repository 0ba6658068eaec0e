"""Offline data preparation: nuScenes folders (real or synthetic) in, array records out."""
