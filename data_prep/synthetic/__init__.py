"""A procedural driving world, simulated, rendered and written as a nuScenes v1.0 folder."""
