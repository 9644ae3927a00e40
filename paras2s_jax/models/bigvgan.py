"""BigVGAN v2 (arXiv 2206.04658): mel frames -> waveform, with anti-aliased periodic activations.

Arithmetic of NVIDIA's BigVGAN (AMPBlock1, SnakeBeta, Activation1d) as Kimi-Audio uses it. All
arrays inside are [B, T, channels]; the blocks of a stage run side by side on the channel axis.

Weight norm: a checkpoint's `weight_g` and `weight_v` stay two parameters, because w = g v / |v|
cannot be undone to the bit; `fold_weight_norm` turns them into one `kernel`, once, for a module
with folded=True. Both forms give the same waveform.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from paras2s_jax.audio import mel as mel_lib
from paras2s_jax.models import axes
from paras2s_jax.models.layers import KERNEL_INIT
from paras2s_jax.models.placement import constrain
from paras2s_jax.models.snake import TAPS, activate, lowpass_filter, silence_rest

EDGE_KERNEL = 7  # Width of the first and the last convolution.
MAGNITUDE_EPS = 1e-9
MEL_FLOOR = 1e-5


@dataclass(frozen=True)
class BigVGANConfig:
    """Sizes; names follow the released vocoder/config.json."""

    upsample_rates: tuple[int, ...]
    upsample_kernel_sizes: tuple[int, ...]
    upsample_initial_channel: int
    resblock_kernel_sizes: tuple[int, ...]
    resblock_dilation_sizes: tuple[tuple[int, ...], ...]
    num_mels: int
    sampling_rate: int
    hop_size: int
    n_fft: int
    win_size: int
    fmin: float = 0.0
    fmax: float | None = None
    resblock: str = "1"
    activation: str = "snakebeta"
    snake_logscale: bool = True
    use_tanh_at_final: bool = True
    use_bias_at_final: bool = True

    def __post_init__(self):
        problems = []
        if self.resblock != "1" or self.activation != "snakebeta":
            problems.append("only resblock 1 with activation snakebeta is supported")
        if math.prod(self.upsample_rates) != self.hop_size:
            problems.append(f"upsample_rates do not multiply to hop_size {self.hop_size}")
        pairs = zip(self.upsample_kernel_sizes, self.upsample_rates, strict=True)
        if any(kernel < rate or (kernel - rate) % 2 for kernel, rate in pairs):
            problems.append("upsample_kernel_sizes must exceed upsample_rates by even numbers")
        if len({len(sizes) for sizes in self.resblock_dilation_sizes}) != 1:
            problems.append("resblock_dilation_sizes must be of equal lengths")
        if problems:
            raise ValueError(f"BigVGAN config: {'; '.join(problems)}")

    @classmethod
    def from_json(cls, path: str | Path) -> "BigVGANConfig":
        """Reads config.json; ValueError names keys that are missing or values not supported."""
        values: Mapping = json.loads(Path(path).read_text())
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise ValueError(f"{path}: keys missing from the config: {', '.join(missing)}")
        known = {f.name: _frozen(values[f.name]) for f in fields(cls) if f.name in values}
        try:
            return cls(**known)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def channels(self, stage: int) -> int:
        """Width after `stage` transposed convolutions; each halves it."""
        return self.upsample_initial_channel >> stage


def _frozen(value):
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def conv(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, dilation: int = 1) -> jax.Array:
    """Convolution of equal length, zeros around. x: [B, T, I]; kernel: [k, I, O]; bias: [O]."""
    reach = (kernel.shape[0] - 1) * dilation // 2
    y = jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(1,),
        padding=[(reach, reach)],
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    return y if bias is None else y + bias.astype(y.dtype)


def spread_conv(x: jax.Array, kernel: jax.Array, dilation: jax.Array, most: int) -> jax.Array:
    """As `conv` without bias, for a dilation that is known when it runs: int32[], up to `most`."""
    size, width, features = kernel.shape
    reach = (size - 1) // 2 * most
    steps, x = x.shape[1], jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
    begins = [reach + (tap - (size - 1) // 2) * dilation for tap in range(size)]
    taps = [jax.lax.dynamic_slice_in_dim(x, begin, steps, axis=1) for begin in begins]
    kernel = kernel.reshape(size * width, features).astype(x.dtype)
    return jnp.concatenate(taps, axis=-1) @ kernel


def conv_transpose(x: jax.Array, kernel: jax.Array, bias: jax.Array, stride: int) -> jax.Array:
    """torch's ConvTranspose1d with padding (k - stride) / 2: T becomes T * stride.

    Written as a convolution that gives all `stride` phases of a step at once: no multiplication
    by the zeros between the samples. x: [B, T, I]; kernel: [k, I, O]; bias: [O].
    """
    rows, steps, width = x.shape
    size, _, features = kernel.shape
    reach = -(-size // stride)  # Input steps that an output sees.
    kernel = jnp.pad(kernel, ((0, reach * stride - size), (0, 0), (0, 0))).astype(x.dtype)
    # Tap r + j * stride carries input t - j to output phase r; correlation wants j descending.
    kernel = kernel.reshape(reach, stride, width, features)[::-1]
    kernel = kernel.transpose(0, 2, 1, 3).reshape(reach, width, stride * features)
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1,),
        padding=[(reach - 1, reach - 1)],
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    cut = (size - stride) // 2
    y = y.reshape(rows, -1, features)[:, cut : cut + steps * stride]
    return y + bias.astype(y.dtype)


def normed(v: jax.Array, g: jax.Array) -> jax.Array:
    """w = g v / |v|, the norm over all axes along which g has one value (weight norm)."""
    over = tuple(axis for axis, size in enumerate(g.shape) if size == 1)
    v = v.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(jnp.square(v), axis=over, keepdims=True))
    return v * (g.astype(jnp.float32) / norm)


def fold_weight_norm(params: Mapping) -> dict:
    """Parameters of BigVGAN(folded=False) -> those of BigVGAN(folded=True), of the same dtype."""
    if "weight_v" in params:
        rest = {k: v for k, v in params.items() if k not in ("weight_g", "weight_v")}
        kernel = normed(params["weight_v"], params["weight_g"])
        return {"kernel": kernel.astype(params["weight_v"].dtype)} | rest
    return {k: fold_weight_norm(v) if isinstance(v, Mapping) else v for k, v in params.items()}


class ConvWeights(nn.Module):
    """Kernel and bias of one convolution, or of a stack of equal ones, with weight norm.

    shape: [stack …, k, in, out]; kept: the axis along which weight_g varies (besides the stack),
    -1 (out) or, for transposed convolutions, -2 (in).
    """

    shape: tuple[int, ...]
    kept: int = -1
    use_bias: bool = True
    folded: bool = False
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        """Returns: (kernel of `shape`, bias [stack …, out] or None)."""
        stack = self.shape[:-3]
        names = (None,) * (len(stack) + 1) + (axes.EMBED, axes.MLP)

        def param(name, init, shape, names):
            init = nn.with_logical_partitioning(init, names)
            return self.param(name, init, shape, self.param_dtype)

        if self.folded:
            kernel = param("kernel", KERNEL_INIT, self.shape, names)
        else:
            last = [(size, name) for size, name in zip(self.shape[-2:], names[-2:], strict=True)]
            last = [pair if i == self.kept else (1, None) for i, pair in zip((-2, -1), last)]
            sizes, g_names = zip(*last, strict=True)
            g_names = (None,) * (len(stack) + 1) + g_names
            v = param("weight_v", KERNEL_INIT, self.shape, names)
            g = param("weight_g", nn.initializers.ones, (*stack, 1, *sizes), g_names)
            kernel = normed(v, g)
        if not self.use_bias:
            return kernel, None
        bias_names = (None,) * len(stack) + (axes.MLP,)
        zeros = nn.initializers.zeros
        return kernel, param("bias", zeros, (*stack, self.shape[-1]), bias_names)


class Activations(nn.Module):
    """Parameters of `count` activations of `width` channels each, stacked."""

    count: int
    width: int
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        """Returns: alpha, beta [count, C]; up, down [count, TAPS, C], filters of each channel."""

        def filters(name):
            values = self.param(name, _filter_init, (self.count, 1, 1, TAPS), self.param_dtype)
            return jnp.broadcast_to(
                values.reshape(self.count, TAPS, 1), (self.count, TAPS, self.width)
            )

        init = nn.with_logical_partitioning(nn.initializers.zeros, (None, axes.MLP))
        shape = (self.count, self.width)
        alpha, beta = (self.param(n, init, shape, self.param_dtype) for n in ("alpha", "beta"))
        up, down = filters("up_filter"), filters("down_filter")
        return {"alpha": alpha, "beta": beta, "up": up, "down": down}


def _filter_init(_key, shape, dtype):
    return jnp.broadcast_to(jnp.asarray(lowpass_filter(), dtype), shape)


class AMPBlock(nn.Module):
    """Parameters of one residual block (AMPBlock1); `amp_blocks` applies several at once."""

    width: int
    kernel_size: int
    num_dilations: int
    folded: bool = False
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self) -> dict:
        """Returns: convs1, convs2: (kernel [n, k, C, C], bias [n, C]); activations: 2n stacked."""
        shape = (self.num_dilations, self.kernel_size, self.width, self.width)
        types = {"folded": self.folded, "param_dtype": self.param_dtype}
        return {
            "convs1": ConvWeights(shape, name="convs1", **types)(),
            "convs2": ConvWeights(shape, name="convs2", **types)(),
            "activations": Activations(
                2 * self.num_dilations, self.width, self.param_dtype, name="activations"
            )(),
        }


def amp_blocks(
    x: jax.Array,
    blocks: Sequence[Mapping],
    dilations: Sequence[Sequence[int]],
    lens: jax.Array | None,
    logscale: bool,
) -> list[jax.Array]:
    """What each block of a stage makes of x: [B, T, C].

    The blocks run side by side on [B, T, blocks * C], and their equal steps, an activation and a
    convolution each, are turns of a loop: a vocoder of seven stages has 7 activations to compile
    instead of 42, and 28 convolutions instead of 168.
    """
    width, count = x.shape[-1], len(blocks)
    part = [slice(i * width, (i + 1) * width) for i in range(count)]
    weights = [block["activations"] for block in blocks]
    weights = jax.tree.map(lambda *w: jnp.concatenate(w, axis=-1), *weights)
    # Of each residual step: first with the dilation, then without.
    weights = jax.tree.map(lambda w: w.reshape(-1, 2, *w.shape[1:]), weights)
    pairs = [
        jax.tree.map(lambda *w: jnp.stack(w, axis=1), block["convs1"], block["convs2"])
        for block in blocks
    ]
    kernels = [kernel for kernel, _ in pairs]
    biases = jnp.concatenate([bias for _, bias in pairs], axis=-1)
    apart = np.array([[[d, 1] for d in sizes] for sizes in dilations], np.int32)

    def half(y, turn):
        weights, kernels, bias, apart = turn
        y = activate(y, weights, lens, logscale)
        parts = [
            spread_conv(y[..., part[i]], kernels[i], apart[i], max(dilations[i]))
            for i in range(count)
        ]
        return jnp.concatenate(parts, axis=-1) + bias.astype(y.dtype), None

    def step(x, turns):
        return x + jax.lax.scan(half, x, turns)[0], None

    turns = (weights, kernels, biases, jnp.asarray(apart.transpose(1, 2, 0)))
    y, _ = jax.lax.scan(step, jnp.tile(x, count), turns)
    return [y[..., part[i]] for i in range(count)]


class BigVGAN(nn.Module):
    """Mel frames -> waveform (the generator). folded: whether weight norm was folded before."""

    config: BigVGANConfig
    folded: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def __call__(self, x: jax.Array, lens: jax.Array | None = None, emit: tuple[str, ...] = ()):
        """The reference's layout. x: float[B, M, A]. Returns: (float32[B, 1, A * hop], out).

        lens, emit, out: as in `wave`, but out's arrays are [B, C, T].
        """
        waves, out = self.wave(x.swapaxes(1, 2), lens, emit)
        return waves[:, None], {name: y.swapaxes(1, 2) for name, y in out.items()}

    @nn.compact
    def wave(self, mel: jax.Array, lens: jax.Array | None = None, emit: tuple[str, ...] = ()):
        """Waveforms of mel frames, each row independent of its padding.

        mel: float[B, A, M], natural-log mel magnitudes; lens: int32[B] frames, or None: all real.
        emit: of "conv_pre", "up0", "resblock0" … (the blocks of the first stage) and "conv_post".
        Returns: (float32[B, A * hop], 0 past lens; out), out: float[B, T, C] of what emit names.
        """
        c, types = self.config, {"folded": self.folded, "param_dtype": self.param_dtype}
        width = c.upsample_initial_channel
        pre = ConvWeights((EDGE_KERNEL, c.num_mels, width), name="conv_pre", **types)()
        x = conv(silence_rest(mel.astype(self.dtype), lens), *pre)
        out = {"conv_pre": x}
        num_kernels = len(c.resblock_kernel_sizes)
        stages = zip(c.upsample_rates, c.upsample_kernel_sizes, strict=True)
        for stage, (rate, size) in enumerate(stages):
            shape = (size, width, c.channels(stage + 1))
            width, num_dilations = shape[-1], len(c.resblock_dilation_sizes[0])
            up = ConvWeights(shape, kept=-2, name=f"ups_{stage}", **types)()
            x = conv_transpose(silence_rest(x, lens), *up, rate)
            lens = None if lens is None else lens * rate
            blocks = [
                AMPBlock(width, k, num_dilations, name=f"resblocks_{n}", **types)
                for n, k in enumerate(c.resblock_kernel_sizes, stage * num_kernels)
            ]
            blocks = [block() for block in blocks]
            ys = amp_blocks(x, blocks, c.resblock_dilation_sizes, lens, c.snake_logscale)
            if stage == 0:
                out |= {"up0": x} | {f"resblock{j}": y for j, y in enumerate(ys)}
            x = sum(ys) / num_kernels
            x = constrain(x, (axes.ACT_BATCH, axes.ACT_LEN, None))
        last = Activations(1, width, self.param_dtype, name="activation_post")()
        x = activate(x, {name: w[0] for name, w in last.items()}, lens, c.snake_logscale)
        shape = (EDGE_KERNEL, width, 1)
        post = ConvWeights(shape, use_bias=c.use_bias_at_final, name="conv_post", **types)()
        x = out["conv_post"] = conv(x, *post).astype(jnp.float32)
        x = jnp.tanh(x) if c.use_tanh_at_final else jnp.clip(x, -1.0, 1.0)
        return silence_rest(x, lens)[..., 0], {name: out[name] for name in emit}


def log_mel(waves: jax.Array, config: BigVGANConfig) -> jax.Array:
    """The vocoder's own mel analysis, as voice prompts need it.

    waves: float32[B, L] at config.sampling_rate. Returns: float32[B, L // hop, M] (for L a
    multiple of hop), natural logarithms of mel magnitudes.
    """
    c = config
    edge = (c.n_fft - c.hop_size) // 2
    waves = jnp.pad(waves, ((0, 0), (edge, edge)), mode="reflect")
    before = (c.n_fft - c.win_size) // 2
    window = np.pad(mel_lib.hann(c.win_size), (before, c.n_fft - c.win_size - before))
    power = mel_lib.power_spectrogram(waves, n_fft=c.n_fft, hop=c.hop_size, window=window)
    magnitude = jnp.sqrt(power + MAGNITUDE_EPS)
    filters = mel_lib.mel_filters(c.sampling_rate, c.n_fft, c.num_mels, c.fmax, min_hz=c.fmin)
    mel = jnp.einsum("BAF,FM->BAM", magnitude, filters, precision=jax.lax.Precision.HIGHEST)
    return jnp.log(jnp.maximum(mel, MEL_FLOOR))
