"""Checkpoint conversion: one table per model family, applied by rules.py, strictly both ways."""

from paras2s_jax.convert.pretrained import from_pretrained

__all__ = ["from_pretrained"]
