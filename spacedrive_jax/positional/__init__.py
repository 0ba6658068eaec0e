"""The universal coordinate encoder (3D point to embedding) and decoder (hidden state to 3D point)."""
