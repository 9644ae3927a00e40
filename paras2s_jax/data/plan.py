"""Which rows form which batch: the order of one epoch, as an array of row indices.

Pure functions of lengths and a random generator, equal on every process.
"""

import math
from collections.abc import Sequence

import numpy as np

# Batches per shuffled window: rows are sorted by length inside a window only, which must be long
# enough to fill batches of one bucket and short enough to keep epochs different.
WINDOW_BATCHES = 16


def order_rows(
    ranks: np.ndarray, *, batch_size: int, shuffle: bool, repeat: bool, rng: np.random.Generator
) -> np.ndarray:
    """Orders single rows into the batches of one epoch.

    When shuffling, rows of one rank (bucket) go together as far as a window allows, and batches
    then come in random order. The last batch is completed with rows from the start of the order
    (repeat) or with -1.
    ranks: int[N]. Returns: int[batches, batch_size], indices of rows or -1.
    """
    num_rows = len(ranks)
    order = rng.permutation(num_rows) if shuffle else np.arange(num_rows)
    num_batches = math.ceil(num_rows / batch_size)
    if repeat:
        order = np.resize(order, num_batches * batch_size)
    if shuffle:
        order = _sort_windows(order, ranks, WINDOW_BATCHES * batch_size)
    plan = np.full(num_batches * batch_size, -1)
    plan[: len(order)] = order
    plan = plan.reshape(num_batches, batch_size)
    if shuffle:
        num_full = len(order) // batch_size
        plan[:num_full] = plan[rng.permutation(num_full)]
    return plan


def order_groups(
    ranks: np.ndarray,
    groups: Sequence[np.ndarray],
    *,
    batch_size: int,
    shuffle: bool,
    rng: np.random.Generator,
) -> np.ndarray:
    """Orders groups of rows into batches, never splitting a group; gaps are -1.

    First fit by decreasing size: the number of batches depends on the sizes only, so every epoch
    has the same. Returns: int[batches, batch_size].
    """
    sizes = np.array([len(group) for group in groups])
    if sizes.max() > batch_size:
        raise ValueError(
            f"a group of {sizes.max()} rows exceeds batch_size {batch_size}; raise batch_size"
        )
    order = rng.permutation(len(groups)) if shuffle else np.arange(len(groups))
    if shuffle:
        group_ranks = np.array([ranks[group].max() for group in groups])
        window = max(1, int(WINDOW_BATCHES * batch_size / sizes.mean()))
        order = _sort_windows(order, group_ranks, window)
    order = order[np.argsort(-sizes[order], kind="stable")]
    batches: list[list[int]] = []
    first, size_before = 0, None
    for unit in order:
        size = sizes[unit]
        if size != size_before:
            first, size_before = 0, size
        # A batch too full for one group of this size is too full for all later ones of it.
        while first < len(batches) and len(batches[first]) + size > batch_size:
            first += 1
        if first == len(batches):
            batches.append([])
        batches[first].extend(groups[unit].tolist())
    if shuffle:
        batches = [batches[i] for i in rng.permutation(len(batches))]
    plan = np.full((len(batches), batch_size), -1)
    for at, batch in enumerate(batches):
        plan[at, : len(batch)] = batch
    return plan


def _sort_windows(order: np.ndarray, ranks: np.ndarray, window: int) -> np.ndarray:
    parts = [order[at : at + window] for at in range(0, len(order), window)]
    return np.concatenate([part[np.argsort(ranks[part], kind="stable")] for part in parts])
