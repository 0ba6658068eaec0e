"""A procedural driving world: towns, traffic, signals, weather, and what its sensors see of it."""
