"""How attention to given keys is computed: which kernel suits a platform and a shape.

| where | when | kernel |
| --- | --- | --- |
| NVIDIA GPU of compute capability 8 or more | float16 or bfloat16, head size a multiple of 8 up to
  128, more than SHORT keys, even lengths where there is a mask | cuDNN flash attention |
| TPU | more than SHORT keys, no mask or one per key | the Pallas flash kernel that jax ships |
| one CPU device | more than SHORT keys, or CPU_SCORES queries times keys | a head and a block of
  queries at a time (models/blocked.py) |
| else | | the whole score matrix (XLA) |

The choice is made while a program is traced: for the devices of the ambient mesh if there is one
(so also when compiling ahead for an absent TPU), else for the default backend.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from paras2s_jax.models import axes, blocked

# Keys up to which accelerators take the same simple program.
SHORT = 512
# A CPU has the scores of all heads in its caches up to here, and is faster without a loop.
CPU_SCORES = 10_000
# The TPU kernel works on blocks of 128 positions; larger ones amortise its loops.
TPU_BLOCK = 512
KERNELS = ("xla", "blocked", "pallas", "cudnn")
HEADS_AXES = (axes.ACT_BATCH, axes.ACT_HEADS, None, None)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    scale: float | None = None,
    bias: jax.Array | None = None,
    kernel: str | None = None,
) -> jax.Array:
    """Softmax attention, with the softmax in float32; K may divide N (grouped queries).

    q: float[B, T, N, H]; k, v: float[B, S, K, H]; mask: bool[B, 1|N, T|1, S] or None;
    bias: float[1|B, N, T, S], added to the scaled scores, or None; kernel: one of KERNELS, by
    default what choose says. Returns: as q. A query without any visible key gets a finite,
    meaningless value.
    """
    kernel = kernel or choose(q, k, mask, bias)
    if kernel == "blocked":
        heads_first = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        return jnp.swapaxes(blocked.attend(*heads_first, mask, scale, bias), 1, 2)
    if kernel == "pallas":
        if bias is not None:
            raise ValueError("attend: the TPU kernel takes no bias")
        return pallas_flash(q, k, v, mask, scale)
    # XLA's form is the default there, and None keeps that program as it is.
    kernel = None if kernel == "xla" else kernel
    return jax.nn.dot_product_attention(q, k, v, bias, mask, scale=scale, implementation=kernel)


def choose(q: jax.Array, k: jax.Array, mask=None, bias=None) -> str:
    """Name of the kernel that suits the arguments of attend."""
    platform, _ = target()
    if suits_blocks(q.shape[1], k.shape[1]):
        return "blocked"
    if k.shape[1] <= SHORT:
        return "xla"
    by_key = mask is None or mask.shape[1:3] == (1, 1)
    if platform == "tpu" and by_key and bias is None:
        return "pallas"
    if platform == "gpu" and _suits_cudnn(q, k, mask is not None or bias is not None):
        return "cudnn"
    return "xla"


def suits_blocks(steps: int, size: int) -> bool:
    """Whether `steps` queries of `size` keys are best attended to in blocks."""
    # Over several (virtual) CPU devices a loop over heads would gather what is spread.
    return target() == ("cpu", 1) and (size > SHORT or steps * size >= CPU_SCORES)


def target() -> tuple[str, int]:
    """Platform that the traced program is for, and its number of devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.abstract_device is not None:
        return mesh.abstract_device.platform, mesh.size
    return jax.default_backend(), 1


def _suits_cudnn(q, k, has_bias: bool) -> bool:
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version or float(device.compute_capability) < 8:
        return False
    # In training, cuDNN takes a bias (a mask becomes one) for even lengths only.
    even = not has_bias or (q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0)
    return q.dtype in (jnp.float16, jnp.bfloat16) and q.shape[-1] in range(8, 129, 8) and even


def pallas_flash(q, k, v, mask=None, scale=None) -> jax.Array:
    """As attend by jax's flash kernel for TPU; mask: bool[B, 1, 1, S] or None."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    width, group = q.shape[-1], q.shape[2] // k.shape[2]
    steps, size = q.shape[1], k.shape[1]
    real = jnp.ones((k.shape[0], size), bool) if mask is None else mask[:, 0, 0]
    real = jnp.broadcast_to(real, (k.shape[0], size))

    def heads_first(x, repeats):
        x = jnp.repeat(x, repeats, axis=2) if repeats > 1 else x
        return _fill_blocks(x.transpose(0, 2, 1, 3), axis=2)

    # Queries are of segment 1, and so are the keys that they may see.
    queries = _fill_blocks(jnp.ones((q.shape[0], steps), jnp.int32), axis=1)
    segments = flash.SegmentIds(queries, _fill_blocks(real.astype(jnp.int32), axis=1))
    edge = math.gcd(TPU_BLOCK, queries.shape[1], segments.kv.shape[1])
    blocks = {field.name: edge for field in dataclasses.fields(flash.BlockSizes)}
    run = functools.partial(
        flash.flash_attention,
        sm_scale=width**-0.5 if scale is None else scale,
        block_sizes=flash.BlockSizes(**blocks | {"block_b": 1}),
    )
    args = (heads_first(q, 1), heads_first(k, group), heads_first(v, group))
    out = _spread(run, *args, segments)
    return out[:, :, :steps].transpose(0, 2, 1, 3)


def _fill_blocks(x: jax.Array, axis: int) -> jax.Array:
    """Pads an axis with zeros to a multiple of 128."""
    room = [(0, 0)] * x.ndim
    room[axis] = (0, -x.shape[axis] % 128)
    return jnp.pad(x, room)


def _spread(run, q, k, v, segments):
    """run(q, k, v, segment_ids=…), rows and heads spread over the ambient mesh, if there is one.

    XLA cannot split a Pallas kernel by itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return run(q, k, v, segment_ids=segments)
    spec = nn.logical_to_mesh_axes(HEADS_AXES) or (None,) * 4
    spec = PartitionSpec(*(a if _divides(mesh, a, n) else None for a, n in zip(spec, q.shape)))
    return jax.shard_map(
        lambda q, k, v, s: run(q, k, v, segment_ids=s),
        in_specs=(spec, spec, spec, PartitionSpec(spec[0])),
        out_specs=spec,
        check_vma=False,
    )(q, k, v, segments)


def _divides(mesh, names, size: int) -> bool:
    names = (names,) if isinstance(names, str) else names or ()
    return size % math.prod(mesh.shape[name] for name in names) == 0
