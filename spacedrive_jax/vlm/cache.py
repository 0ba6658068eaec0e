"""The decoder's key and value memory: fixed shapes, each sample at its own length."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, allocated once (`Decoder.prefill`).

    Sample b holds `lengths[b]` tokens at the front of its row; what lies behind is never attended to.
    The caller sees to it that no sample outgrows the capacity: writes past the end are dropped.
    """

    keys: Float[Array, "L B capacity K H"]
    values: Float[Array, "L B capacity K H"]
    lengths: Int[Array, " B"]

    @property
    def capacity(self) -> int:
        """Tokens that fit in one sample's row."""
        return self.keys.shape[2]

    def write(
        self, layer: Int[Array, ""], keys: Float[Array, "B S K H"], values: Float[Array, "B S K H"]
    ) -> KVCache:
        """Puts one layer's new keys and values behind each sample's tokens; lengths stay as they are."""
        batch, new_tokens = keys.shape[:2]
        rows = jnp.arange(batch)[:, None]
        slots = self.lengths[:, None] + jnp.arange(new_tokens)
        return dataclasses.replace(
            self,
            keys=self.keys.at[layer, rows, slots].set(keys.astype(self.keys.dtype), mode="drop"),
            values=self.values.at[layer, rows, slots].set(values.astype(self.values.dtype), mode="drop"),
        )

    def attention_mask(self, new_tokens: int) -> Bool[Array, "B 1 S capacity"]:
        """Which slots each of `new_tokens` coming tokens may see: its own and all before it."""
        last_visible = self.lengths[:, None] + jnp.arange(new_tokens)
        return (jnp.arange(self.capacity) <= last_visible[..., None])[:, None]

    def grown(self, new_tokens: Int[Array, " B"] | int) -> KVCache:
        """The cache with `new_tokens` more tokens counted in each sample."""
        return dataclasses.replace(self, lengths=self.lengths + new_tokens)
