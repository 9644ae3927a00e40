"""Runs a jitted function over waves of any number and length with few compiled shapes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from paras2s_jax.audio.wave import RATE_HZ


class Buckets:
    """Fixed shapes [batch_size, L] for a few lengths L, so that nothing is compiled twice.

    Args:
        len_buckets_s: lengths in seconds that waves are padded to; the longest is the limit.
        batch_size: rows per call; a last, smaller batch is filled with copies of its first row.
    """

    def __init__(self, len_buckets_s: Sequence[float], batch_size: int):
        if not len_buckets_s or batch_size < 1:
            raise ValueError(
                f"need a bucket length and a batch size, got {len_buckets_s} and {batch_size}."
            )
        self._lens = sorted(round(dur_s * RATE_HZ) for dur_s in len_buckets_s)
        self._batch_size = batch_size
        self.max_dur_s = max(len_buckets_s)

    def run(self, fn: Callable[..., Any], *waves: Sequence[np.ndarray]) -> list[Any]:
        """Applies `fn` to all waves, or to pairs of them and so on.

        Args:
            fn: (float32[B, L], lens int32[B]), for each sequence of waves → a pytree of arrays
                [B, ...].
            waves: sequences of float32[L], each as long as the first; what belongs together is
                padded to the bucket of its longest.

        Returns:
            Per wave, or pair, in order, its row of the pytree, as numpy.
        """
        longest = [max(map(len, together)) for together in zip(*waves, strict=True)]
        if longest and max(longest) > self._lens[-1]:
            raise ValueError(
                f"a wave of {max(longest) / RATE_HZ:.2f} s exceeds the longest bucket of "
                f"{self.max_dur_s:.2f} s; add a longer bucket."
            )
        bucket_of = np.searchsorted(self._lens, longest)
        # Waves of like lengths together: what is said in them ends at about the same step.
        by_length = np.argsort(longest, kind="stable")
        results: list[Any] = [None] * len(longest)
        for bucket in np.unique(bucket_of):
            members = by_length[bucket_of[by_length] == bucket]
            for start in range(0, len(members), self._batch_size):
                rows = members[start : start + self._batch_size]
                batch: list[np.ndarray] = []
                for sequence in waves:
                    batch += self._pad([sequence[row] for row in rows], self._lens[bucket])
                out = jax.tree.map(np.asarray, fn(*batch))
                for at, row in enumerate(rows):
                    results[row] = jax.tree.map(lambda x, at=at: x[at], out)
        return results

    def _pad(self, waves: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns: float32[batch_size, length], lens int32[batch_size]."""
        padded = np.zeros((self._batch_size, length), np.float32)
        lens = np.zeros(self._batch_size, np.int32)
        for at in range(self._batch_size):
            wave = waves[at] if at < len(waves) else waves[0]
            padded[at, : len(wave)] = wave
            lens[at] = len(wave)
        return padded, lens
