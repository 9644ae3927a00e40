"""Checkpoint conversion: one table per model family, applied by rules.py."""
