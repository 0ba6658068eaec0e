"""One short file per run; each defines `config`, a `spacedrive_jax.config.Config`."""
