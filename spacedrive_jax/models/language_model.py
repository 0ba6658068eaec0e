"""The language model: Qwen2.5, Qwen3 and LLaMA as settings of one module, and greedy generation with it.

Pre-norm blocks of grouped-query attention and SwiGLU, stacked and scanned. Low-rank adapters sit inside
the projections; the rows of newly added tokens are small trainable tables beside the frozen
embedding and head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key

from spacedrive_jax.errors import ConfigError
from spacedrive_jax.models.attention import KVCache, attend, repeat_kv_heads
from spacedrive_jax.models.config import ComputeConfig, LanguageModelConfig, LoraConfig, NewTokensConfig
from spacedrive_jax.models.layers import (
    Projection,
    RMSNorm,
    SwiGLU,
    parameter,
    scan_layers,
    stack_layers,
    weight_initializer,
)
from spacedrive_jax.models.partitioning import constrain
from spacedrive_jax.models.positions import RotaryTables, decoder_rotary, frequency_axes, rotate


class NewTokenParam(nnx.Param):
    """Embedding or head rows of newly added tokens: trainable, float32, beside the frozen table."""


KeysValues = tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]


class Attention(nnx.Module):
    """Causal grouped-query self-attention with rotary embedding."""

    def __init__(
        self, config: LanguageModelConfig, *, lora: LoraConfig | None, compute: ComputeConfig, rngs: nnx.Rngs
    ) -> None:
        model, head = (config.hidden_size,), config.head_dim
        query, key_value = (config.num_heads, head), (config.num_kv_heads, head)
        outer, query_names, kv_names = ("embed",), ("heads", "head_dim"), ("kv_heads", "head_dim")
        make = functools.partial(Projection, compute=compute, rngs=rngs)

        q, k, v, o = (None,) * 4 if lora is None else map(lora.on, ("q", "k", "v", "o"))
        bias = config.qkv_bias
        self.q = make(model, query, outer, query_names, bias=bias, lora=q)
        self.k = make(model, key_value, outer, kv_names, bias=bias, lora=k)
        self.v = make(model, key_value, outer, kv_names, bias=bias, lora=v)
        self.o = make(query, model, query_names, outer, bias=False, lora=o)
        self.attention_choice = compute.attention

        def head_norm() -> RMSNorm | None:
            if not config.qk_norm:
                return None
            return RMSNorm(head, config.norm_eps, name="head_dim", compute=compute, rngs=rngs)

        self.q_norm, self.k_norm = head_norm(), head_norm()

    def __call__(
        self,
        x: Float[Array, "B S D"],
        rotary: RotaryTables,
        *,
        lengths: Int[Array, " B"] | None,
        cache: KVCache | None,
        cache_mask: Bool[Array, "B 1 S capacity"] | None,
        layer: Int[Array, ""],
        dropout_keys: Key[Array, " 4"] | None,
    ) -> tuple[Float[Array, "B S D"], KVCache | KeysValues]:
        """Attends among the new tokens, or to the cache as well.

        Returns:
            What was attended to, and the cache with the new tokens; without one, their keys and values.
        """
        q_key, k_key, v_key, o_key = (None,) * 4 if dropout_keys is None else dropout_keys
        # Pinned where they are made: left open, the partitioner keeps the sequence's cut over `tensor` and
        # gathers the weights over it.
        q = constrain(self.q(x, dropout_key=q_key), "batch", None, "heads", None)
        k = constrain(self.k(x, dropout_key=k_key), "batch", None, "kv_heads", None)
        v = constrain(self.v(x, dropout_key=v_key), "batch", None, "kv_heads", None)
        if self.q_norm is not None and self.k_norm is not None:
            # Kept for the backward pass before the norm, which needs what it normed.
            q, k = checkpoint_name(q, "query"), checkpoint_name(k, "key")
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is None:
            v = checkpoint_name(v, "value")
            if self.q_norm is None:
                q, k = checkpoint_name(q, "query"), checkpoint_name(k, "key")
            attended = attend(q, k, v, choice=self.attention_choice, causal=True, lengths=lengths)
            attended = checkpoint_name(constrain(attended, "batch", None, "heads", None), "attended")
            return self.o(attended, dropout_key=o_key), (k, v)
        cache = cache.write(layer, k, v)
        keys, values = (repeat_kv_heads(each[layer], q.shape[2]) for each in (cache.keys, cache.values))
        attended = jax.nn.dot_product_attention(q, keys, values, mask=cache_mask, implementation="xla")
        return self.o(attended, dropout_key=o_key), cache


class DecoderLayer(nnx.Module):
    """One block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, config: LanguageModelConfig, *, lora: LoraConfig | None, compute: ComputeConfig, rngs: nnx.Rngs
    ) -> None:
        norm = functools.partial(
            RMSNorm, config.hidden_size, config.norm_eps, name="embed", compute=compute, rngs=rngs
        )
        self.attention_norm = norm()
        self.attention = Attention(config, lora=lora, compute=compute, rngs=rngs)
        self.mlp_norm = norm()
        self.mlp = SwiGLU(
            config.hidden_size,
            config.intermediate_size,
            ("embed", "mlp"),
            bias=False,
            compute=compute,
            rngs=rngs,
            lora=lora,
            activations=("batch", None, "mlp"),
        )

    def __call__(
        self,
        x: Float[Array, "B S D"],
        rotary: RotaryTables,
        *,
        mlp_dropout_keys: Key[Array, " 3"] | None,
        **attention: Any,
    ) -> tuple[Float[Array, "B S D"], KVCache | KeysValues]:
        """Runs the block; the other keyword arguments and the second result are those of `Attention`."""
        attended, memory = self.attention(self.attention_norm(x), rotary, **attention)
        x = checkpoint_name(constrain(x + attended, "batch", "sequence", None), "residual")
        fed_forward = self.mlp(self.mlp_norm(x), mlp_dropout_keys)
        return constrain(x + fed_forward, "batch", "sequence", None), memory


class LanguageModel(nnx.Module):
    """Embedding table, stacked blocks, final norm and language-model head."""

    def __init__(
        self,
        config: LanguageModelConfig,
        *,
        compute: ComputeConfig,
        rngs: nnx.Rngs,
        lora: LoraConfig | None = None,
        new_tokens: NewTokensConfig | None = None,
    ) -> None:
        """Draws a fresh language model.

        Args:
            config: architecture.
            compute: dtypes, rematerialisation, attention kernel.
            rngs: random streams (`params`).
            lora: adapters on the blocks' projections; None for none.
            new_tokens: ids with trainable rows of their own; None for none.

        Raises:
            ConfigError: the new tokens lie outside the vocabulary.
        """
        self.config = config
        self.compute = compute
        self.lora = lora
        self.new_tokens = new_tokens
        width = config.hidden_size
        normal = weight_initializer(compute, width)
        table = functools.partial(
            parameter, nnx.Param, normal, (config.vocab_size, width), ("vocab", "embed"), rngs=rngs
        )
        self.embedding = table(dtype=compute.storage_dtype)
        self.layers = stack_layers(
            lambda streams: DecoderLayer(config, lora=lora, compute=compute, rngs=streams),
            config.num_layers,
            rngs,
        )
        self.final_norm = RMSNorm(width, config.norm_eps, name="embed", compute=compute, rngs=rngs)
        self.head = None if config.tie_word_embeddings else table(dtype=compute.storage_dtype)
        if new_tokens is not None:
            _check_new_tokens(new_tokens, config.vocab_size)

        def new_rows() -> nnx.Param | None:
            if new_tokens is None:
                return None
            shape, names = (new_tokens.count, width), (None, "embed")
            return parameter(NewTokenParam, normal, shape, names, dtype=jnp.float32, rngs=rngs)

        self.new_embedding = new_rows()
        self.new_head = new_rows()

    def embed(self, token_ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Looks token ids up, new tokens in their own rows; compute dtype."""
        # Each device looks its part of the table's width up, for all samples that lie over fsdp, and gets its
        # own samples' whole rows for it: rows are sent, not the table.
        ids = constrain(token_ids, "lookup", None)
        rows = jnp.take(self.embedding[...], ids, axis=0).astype(self.compute.activation_dtype)
        embeddings = constrain(constrain(rows, "lookup", None, "embed"), "batch", "sequence", None)
        if self.new_tokens is None:
            return embeddings
        assert self.new_embedding is not None
        for row in range(self.new_tokens.count):
            own = self.new_embedding[...][row][None, None].astype(embeddings.dtype)
            embeddings = jnp.where((token_ids == self.new_tokens.first_id + row)[..., None], own, embeddings)
        return embeddings

    def __call__(
        self,
        embeddings: Float[Array, "B S D"],
        position_ids: Int[Array, "3 B S"],
        *,
        lengths: Int[Array, " B"] | None = None,
        deepstack: Float[Array, "depths B S D"] | None = None,
        cache: KVCache | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        """Turns embeddings into final-normed hidden states.

        Args:
            embeddings: input embeddings, right-padded.
            position_ids: position ids on the axes time, row, column; a 1-D decoder reads the first only.
            lengths: valid tokens per sample among the S given; None when all are. Hidden states behind them
                are finite but mean nothing.
            deepstack: added to the outputs of the first K blocks, zeros but at visual tokens (DeepStack, Meng
                et al. 2024); None for nothing.
            cache: tokens seen so far. The given tokens stand behind them and are added to it.
            dropout_key: key of the adapters' dropout; None for none (evaluation).

        Returns:
            Hidden states after the final norm, and the grown cache (None without one).
        """
        hidden, cache, _ = self._run(embeddings, position_ids, lengths, cache, dropout_key, deepstack)
        return self.final_norm(hidden), cache

    def prefill(
        self,
        embeddings: Float[Array, "B S D"],
        position_ids: Int[Array, "3 B S"],
        *,
        lengths: Int[Array, " B"] | None = None,
        deepstack: Float[Array, "depths B S D"] | None = None,
        room: int,
    ) -> tuple[Float[Array, "B S D"], KVCache]:
        """As a call without a cache, with the same attention, but keeps what it attended to.

        Args:
            embeddings: input embeddings, right-padded.
            position_ids: position ids on the axes time, row, column.
            lengths: valid tokens per sample; None when all are.
            deepstack: as in a call.
            room: tokens that the cache can take behind the S given.

        Returns:
            Hidden states after the final norm, and a cache of the valid tokens.
        """

        def with_room(hidden: Any, memory: KeysValues) -> tuple[Array, Array]:
            keys, values = (jnp.pad(each, ((0, 0), (0, room), (0, 0), (0, 0))) for each in memory)
            return keys, values

        hidden, _, (keys, values) = self._run(
            embeddings, position_ids, lengths, None, None, deepstack, keep=with_room
        )
        batch, length = embeddings.shape[:2]
        filled = jnp.full(batch, length, jnp.int32) if lengths is None else lengths
        return self.final_norm(hidden), KVCache(keys, values, filled)

    def _run(
        self,
        embeddings: Float[Array, "B S D"],
        position_ids: Int[Array, "3 B S"],
        lengths: Int[Array, " B"] | None,
        cache: KVCache | None,
        dropout_key: jax.Array | None,
        deepstack: Float[Array, "depths B S D"] | None,
        *,
        keep: Callable[[Any, Any], Any] = lambda hidden, memory: None,
    ) -> tuple[Float[Array, "B S D"], KVCache | None, Any]:
        """Runs all blocks; `keep` says what of each (output, second result) is stacked."""
        config, new_tokens = self.config, embeddings.shape[1]
        axes = frequency_axes(
            config.head_dim // 2, config.mrope_section, interleaved=config.mrope_interleaved
        )
        rotary = decoder_rotary(position_ids, axes, config.rope_theta)
        cache_mask = None if cache is None else cache.attention_mask(new_tokens)
        layer_keys, mlp_keys = self._dropout_keys(dropout_key)

        def apply(layer: DecoderLayer, carry: Any, inputs: Any) -> tuple[Any, Any]:
            # The cache travels in the carry, so that XLA updates it in place.
            hidden, cache = carry
            index, keys, mlp_keys = inputs
            hidden, memory = layer(
                hidden,
                rotary,
                lengths=lengths,
                cache=cache,
                cache_mask=cache_mask,
                layer=index,
                dropout_keys=keys,
                mlp_dropout_keys=mlp_keys,
            )
            kept = keep(hidden, memory)
            if deepstack is not None:
                hidden = _add_deepstack(hidden, deepstack, index)
            return (hidden, None if cache is None else memory), kept

        per_layer = (jnp.arange(config.num_layers), layer_keys, mlp_keys)
        start = constrain(embeddings.astype(self.compute.activation_dtype), "batch", "sequence", None)
        (hidden, cache), kept = scan_layers(self.layers, apply, (start, cache), per_layer, self.compute)
        if cache is not None:
            cache = cache.grown(new_tokens if lengths is None else lengths)
        return hidden, cache, kept

    def _dropout_keys(
        self, dropout_key: jax.Array | None
    ) -> tuple[Key[Array, "L 4"] | None, Key[Array, "L 3"] | None]:
        """Each block's keys for attention and for the MLP, where there are adapters."""
        if dropout_key is None:
            return None, None
        layers = self.config.num_layers
        attention_key, mlp_key = jax.random.split(dropout_key)
        attention = jax.random.split(attention_key, (layers, 4))
        if self.lora is None or not {"gate", "up", "down"} & set(self.lora.targets):
            return attention, None
        return attention, jax.random.split(mlp_key, (layers, 3))

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... vocabulary"]:
        """Scores every vocabulary id from final-normed hidden states, float32.

        The full vocabulary is large: hand over only the positions whose logits are wanted.
        """
        table = self.embedding if self.head is None else self.head
        dtype = self.compute.activation_dtype
        logits = jnp.einsum(
            "...d,vd->...v",
            hidden.astype(dtype),
            table[...].astype(dtype),
            preferred_element_type=jnp.float32,
        )
        if self.new_tokens is None:
            return logits
        assert self.new_head is not None
        new = jnp.einsum("...d,vd->...v", hidden.astype(jnp.float32), self.new_head[...])
        # By comparison: to update a slice of them, devices that share the vocabulary would gather all of it.
        ids = jnp.arange(self.config.vocab_size) - self.new_tokens.first_id
        ids = jax.lax.broadcast_to_rank(ids, logits.ndim)
        for row in range(self.new_tokens.count):
            logits = jnp.where(ids == row, new[..., row, None], logits)
        return logits


def _add_deepstack(
    hidden: Float[Array, "B S D"], deepstack: Float[Array, "depths B S D"], layer: Int[Array, ""]
) -> Float[Array, "B S D"]:
    """What leaves a block, with its row of `deepstack` where there is one."""

    def add(hidden: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        own = jax.lax.dynamic_index_in_dim(deepstack, layer, keepdims=False)
        return constrain(hidden + own.astype(hidden.dtype), "batch", "sequence", None)

    # A branch: as inputs of the scan the rows would need one for every block, zeros in most.
    return jax.lax.cond(layer < len(deepstack), add, lambda hidden: hidden, hidden)


def _check_new_tokens(new_tokens: NewTokensConfig, vocab_size: int) -> None:
    last = new_tokens.first_id + new_tokens.count - 1
    if not 0 <= new_tokens.first_id <= last < vocab_size:
        raise ConfigError(
            f"new tokens {new_tokens.first_id}..{last} must lie in the vocabulary of {vocab_size}; enlarge "
            "model.vlm.decoder.vocab_size or mend new_tokens"
        )


# Greedy generation: one prefill, then a loop of single-token steps, all jittable.


class _Progress(NamedTuple):
    """The loop's state: tokens so far, the last one of each sample, who has stopped, the cache."""

    step: Int[Array, ""]
    tokens: Int[Array, "B T"]
    last: Int[Array, " B"]
    stopped: Bool[Array, " B"]
    cache: KVCache


def continue_greedily(
    decoder: LanguageModel,
    embeddings: Float[Array, "B S D"],
    position_ids: Int[Array, "3 B S"],
    *,
    rope_delta: Int[Array, " B"],
    lengths: Int[Array, " B"],
    deepstack: Float[Array, "depths B S D"] | None,
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> Int[Array, "B T"]:
    """Continues embedded prompts with the most likely token each time.

    Args:
        decoder: the language model.
        embeddings: of right-padded prompts.
        position_ids: theirs.
        rope_delta: offset of each sample's generated positions.
        lengths: valid tokens per prompt.
        deepstack: see `LanguageModel`.
        max_new_tokens: T, tokens to generate per sample at most.
        stop_ids: ids that end a sample (the id itself is kept).
        pad_id: what stands behind the end of a sample that stopped.

    Returns:
        The new ids.
    """
    batch = embeddings.shape[0]
    stops = jnp.asarray(stop_ids, jnp.int32)

    def choose(hidden: Float[Array, "B D"]) -> Int[Array, " B"]:
        return jnp.argmax(decoder.logits(hidden), axis=-1).astype(jnp.int32)

    def put(progress: _Progress, choice: Int[Array, " B"], cache: KVCache) -> _Progress:
        token = jnp.where(progress.stopped, pad_id, choice)
        return _Progress(
            step=progress.step + 1,
            tokens=progress.tokens.at[:, progress.step].set(token),
            last=token,
            stopped=progress.stopped | jnp.isin(token, stops),
            cache=cache,
        )

    def proceed(progress: _Progress) -> _Progress:
        next_positions = jnp.broadcast_to(progress.cache.lengths + rope_delta, (3, batch))[..., None]
        next_embeddings = decoder.embed(progress.last[:, None])
        hidden, cache = decoder(next_embeddings, next_positions, cache=progress.cache)
        assert cache is not None
        return put(progress, choose(hidden[:, 0]), cache)

    hidden, filled = decoder.prefill(
        embeddings, position_ids, lengths=lengths, deepstack=deepstack, room=max_new_tokens
    )
    last_hidden = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    nothing = _Progress(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full((batch, max_new_tokens), pad_id, jnp.int32),
        last=jnp.zeros((batch,), jnp.int32),
        stopped=jnp.zeros((batch,), bool),
        cache=filled,
    )
    first = put(nothing, choose(last_hidden), filled)
    done = jax.lax.while_loop(
        lambda progress: (progress.step < max_new_tokens) & ~progress.stopped.all(), proceed, first
    )
    return done.tokens
