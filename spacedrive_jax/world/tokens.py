"""Tokens: 32 hexadecimal digits hashed from the seed and what they name."""

from __future__ import annotations

import hashlib


def make_token(*parts: object) -> str:
    """A token that depends on all parts, as unique as sha256's first 128 bits."""
    return hashlib.sha256("/".join(str(part) for part in parts).encode()).hexdigest()[:32]
