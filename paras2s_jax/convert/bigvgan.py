"""Key table of Kimi-Audio's BigVGAN (vocoder/: config.json, "generator").

Weight norm stays two parameters, weight_g and weight_v, so that export gives back what was
imported to the bit; models.bigvgan.fold_weight_norm folds it for use. So do the filters, which
the original loader wants to find.
"""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from paras2s_jax.convert.rules import CONV1D, Rule
from paras2s_jax.models.bigvgan import BigVGAN, BigVGANConfig

ARCHITECTURES: tuple[str, ...] = ()  # Its config.json names none; see `matches`.
IGNORE: tuple[str, ...] = ()
CONFIG_FILE = "config.json"
TRANSPOSED = (2, 0, 1)  # torch [in, out, k] <-> kernel [k, in, out]


def matches(folder: Path) -> bool:
    """Whether the folder holds a vocoder as released."""
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(values, dict) and "resblock_dilation_sizes" in values


def make_model(folder: Path, **types) -> nn.Module:
    """The generator of folder/config.json; types: dtype, param_dtype.

    There are no layers to scan: scan_unroll and remat are accepted and change nothing.
    """
    types = {name: value for name, value in types.items() if name not in ("scan_unroll", "remat")}
    return BigVGAN(BigVGANConfig.from_json(Path(folder) / CONFIG_FILE), **types)


def _conv(key: str, path: str, permute, over: range | None = None, use_bias=True) -> list[Rule]:
    names = ("weight_g", "weight_v")
    table = [Rule(f"{key}.{name}", f"{path}/{name}", permute, over) for name in names]
    return [*table, Rule(f"{key}.bias", f"{path}/bias", over=over)] if use_bias else table


def _activations(key: str, path: str, count: int) -> list[Rule]:
    names = {
        "act.alpha": "alpha",
        "act.beta": "beta",
        "upsample.filter": "up_filter",
        "downsample.lowpass.filter": "down_filter",
    }
    over = range(count)
    return [Rule(f"{key}.{name}", f"{path}/{target}", over=over) for name, target in names.items()]


def rules(config: BigVGANConfig) -> list[Rule]:
    """Table of a BigVGAN(folded=False)."""
    count = len(config.resblock_dilation_sizes[0])
    table = _conv("conv_pre", "conv_pre", CONV1D)
    table += _conv("conv_post", "conv_post", CONV1D, use_bias=config.use_bias_at_final)
    table += _activations("activation_post", "activation_post", 1)
    num_stages = len(config.upsample_rates)
    for stage in range(num_stages):
        table += _conv(f"ups.{stage}.0", f"ups_{stage}", TRANSPOSED)
    for block in range(num_stages * len(config.resblock_kernel_sizes)):
        key, path = f"resblocks.{block}", f"resblocks_{block}"
        for name in ("convs1", "convs2"):
            table += _conv(f"{key}.{name}.{{i}}", f"{path}/{name}", CONV1D, range(count))
        table += _activations(f"{key}.activations.{{i}}", f"{path}/activations", 2 * count)
    return table


def init(model: BigVGAN, rng: jax.Array):
    """Variables of one mel frame."""
    return model.init(rng, jnp.zeros((1, model.config.num_mels, 1)))


def load_processor(folder: Path) -> None:
    """Mel frames go in as they are."""
