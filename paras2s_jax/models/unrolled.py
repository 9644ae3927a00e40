"""The form of a decoder that one device steps through fastest: no layer is cut out of an array.

Stacked layers under a scan compile fast and are split over devices easily, but in a decoding loop
each step then copies weights and keys out of the stacks, which on one device costs about as much as
to multiply with them. Here layers are separate, with kernels [out, in] (layers.matmul_out_first).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from paras2s_jax.models.attention import target

# Weights up to here stay in a CPU's caches, and cutting them out costs little: a policy of 14 MB
# steps as fast either way, and unrolled takes twice as long to compile.
SMALL_BYTES = 32 << 20


def decoding_form(model: nn.Module, variables: Mapping) -> tuple[nn.Module, Mapping]:
    """Model and variables as they decode fastest where the program will run.

    On one CPU or GPU large ones are unrolled, at the cost of a copy of the weights; elsewhere, and
    if they are unrolled already, they stay as they are. The loops bring them there themselves: do
    it beforehand where the same weights decode often. model: with a field `unrolled`.
    """
    is_small = sum(x.nbytes for x in jax.tree.leaves(variables)) <= SMALL_BYTES
    if model.unrolled or is_small or target() not in (("cpu", 1), ("gpu", 1)):
        return model, variables
    return model.clone(unrolled=True), jax.jit(unroll_variables)(variables)


def unroll_kv(kv: Any) -> Any:
    """Stacked caches, or keys and values of prompts -> the same with tuples over layers."""
    return jax.tree.map(tuple, kv)


def unroll_variables(variables: Mapping) -> dict:
    """Variables of a model with scanned layers -> of the same model with unrolled=True."""
    made = {}
    for key, value in variables.items():
        if key == "layers":
            for i in range(len(jax.tree.leaves(value)[0])):
                layer = jax.tree.map(lambda x, i=i: x[i], value)
                made[f"layers_{i}"] = unroll_variables(layer)
        elif isinstance(value, Mapping):
            made[key] = unroll_variables(value)
        else:
            made[key] = value.T if key == "kernel" else value
    return made
