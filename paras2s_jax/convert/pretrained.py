"""Released or converted checkpoint -> model, parameters and processor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh, Sharding

from paras2s_jax.convert import families, stored, torch_files
from paras2s_jax.convert.checkpoint import Checkpoint, ConversionError
from paras2s_jax.convert.rules import Parameter, plan
from paras2s_jax.models.placement import Rules, logical_shardings, unbox

# What is fetched from a hub, and what of a release is kept beside converted parameters: no code,
# no pickles.
KEPT_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".yaml")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def from_pretrained(
    path_or_hub_id: str | Path,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> tuple[nn.Module, dict[str, Any], object | None]:
    """Loads a checkpoint of any known family.

    path_or_hub_id: folder of safetensors with config.json as released, folder made by
        `paras2s convert`, or the id of a repository of such files on the Hugging Face hub.
    dtype: in which the model computes. param_dtype: of the parameters, by default `dtype`.
    mesh, rules: where parameters go (logical axis -> mesh axis, as in the config); each tensor is
        read straight into its shards. Without a mesh all go to the first device.
    Returns: (model, params, processor): model.apply({"params": params}, …); the processor is the
        release's own tokenizer or feature extractor, None if it has none.

    Raises:
        ConversionError: the checkpoint is broken, of no known family, or does not fit its config;
            the message lists what is wrong.
        FileNotFoundError: there is nothing to load.
    """
    if (mesh is None) != (rules is None):
        raise ValueError("mesh and rules go together: give both, or neither")
    folder = local_folder(path_or_hub_id)
    family = families.family_of(folder)
    param_dtype = dtype if param_dtype is None else param_dtype
    model = families.make_model(family, folder, dtype=dtype, param_dtype=param_dtype)
    boxed = {"params": families.abstract_variables(family, model)["params"]}
    expected = unbox(boxed)["params"]
    if mesh is None:
        single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: single, expected)
    else:
        shardings = logical_shardings(boxed, mesh, rules)["params"]
    if stored.is_converted(folder):
        params = _load_converted(folder, expected, shardings, param_dtype)
    else:
        planned = plan(
            _released(folder),
            family.rules(model.config),
            expected,
            ignore=family.IGNORE,
            dtype=param_dtype,
            name=str(folder),
        )
        flat = traverse_util.flatten_dict(shardings, sep="/")
        made = {path: place(parameter, flat[path]) for path, parameter in planned.items()}
        params = traverse_util.unflatten_dict(made, sep="/")
    return model, params, family.load_processor(folder)


def local_folder(path_or_hub_id: str | Path, suffixes: Sequence[str] = ()) -> Path:
    """The folder itself, or the hub's files in the local cache.

    suffixes: of files to fetch beside safetensors and the small ones.

    Raises:
        ConversionError: the hub does not give them.
        FileNotFoundError: no folder, and not the form of a hub id.
    """
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(str(path_or_hub_id)):
        raise FileNotFoundError(f"{path_or_hub_id}: no such folder, and no hub id (OWNER/NAME)")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    patterns = [f"*{suffix}" for suffix in (".safetensors", *KEPT_SUFFIXES, *suffixes)]
    try:
        found = huggingface_hub.snapshot_download(str(path_or_hub_id), allow_patterns=patterns)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ConversionError(
            f"{path_or_hub_id} is no folder here, and the hub does not give it ({reason}); "
            "check the name, or give the folder of a downloaded copy"
        ) from error
    return Path(found)


def _released(folder: Path) -> Checkpoint:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in torch_files.SUFFIXES)
    if pickled and not any(folder.glob("*.safetensors")):
        raise ConversionError(
            f"{folder} has no safetensors, only {', '.join(pickled)}; convert it once with "
            f"paras2s convert --from={folder} --to=FOLDER, and give that folder"
        )
    return Checkpoint(folder)


def place(parameter: Parameter, sharding: Sharding) -> jax.Array:
    """Reads a parameter onto devices, shard by shard; this process reads only its own."""
    homes: dict[tuple, list[jax.Device]] = {}
    indices = sharding.addressable_devices_indices_map(parameter.shape)
    for device, index in indices.items():
        key = tuple((part.start, part.stop) for part in index)
        homes.setdefault(key, []).append(device)
    shards = []
    for key, devices in homes.items():
        part = parameter.read(tuple(slice(start, stop) for start, stop in key))
        shards += [jax.device_put(part, device) for device in devices]
    return jax.make_array_from_single_device_arrays(parameter.shape, sharding, shards)


def _load_converted(folder: Path, expected: Any, shardings: Any, dtype: Any) -> dict[str, Any]:
    found = {path: leaf.shape for path, leaf in stored.Stored(folder / stored.PARAMS).items()}
    wanted = {
        path: tuple(leaf.shape)
        for path, leaf in traverse_util.flatten_dict(expected, sep="/").items()
    }
    wrong = [
        f"{path} is {found.get(path, 'absent')}, the model has {wanted.get(path, 'none')}"
        for path in sorted(set(found) | set(wanted))
        if found.get(path) != wanted.get(path)
    ]
    if wrong:
        raise ConversionError(
            f"{folder / stored.PARAMS} does not match the model; {'; '.join(wrong)}"
        )
    variables, _ = stored.load_params(folder / stored.PARAMS, {"params": shardings}, dtype)
    return variables["params"]
