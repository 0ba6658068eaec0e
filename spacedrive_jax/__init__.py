"""SpaceDrive in JAX: a vision-language model that reads and writes 3D positions, and drives."""

__version__ = "0.1.0"
