"""Low-rank adapters: which layers get one, and arithmetic on the "lora" collection."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import traverse_util

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRA:
    """Adapter settings; rank 0 = no adapters. targets: names of the Dense layers."""

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ATTENTION + MLP

    def rank_of(self, name: str) -> int:
        """Rank of the adapter on the Dense called `name` (0 = none)."""
        return self.rank if name in self.targets else 0


NO_LORA = LoRA()


def merge_lora(variables: dict, alpha: float) -> dict:
    """Folds the adapters into the kernels: kernel + (alpha / r) * a @ b.

    variables: {"params": …, "lora": …} (unboxed; layers may be stacked on leading axes).
    Returns: {"params": …} for the same model with rank 0.
    """
    params = traverse_util.flatten_dict(variables["params"])
    adapters = traverse_util.flatten_dict(variables["lora"])
    for path, a in adapters.items():
        if path[-1] != "a":
            continue
        b = adapters[(*path[:-1], "b")]
        kernel_path = (*path[:-1], "kernel")
        kernel = params[kernel_path]
        delta = (alpha / a.shape[-1]) * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        params[kernel_path] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
    return {"params": traverse_util.unflatten_dict(params)}
