"""Released or converted checkpoint -> model, parameters and processor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from paras2s_jax.convert import adapters, families, stored, torch_files
from paras2s_jax.convert.checkpoint import Checkpoint, ConversionError
from paras2s_jax.convert.rules import Parameter, plan
from paras2s_jax.models.lora import merge_lora
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
    Returns: (model, params, processor): model.apply({"params": params}, …), adapters that were
        trained folded in; the processor is the release's own tokenizer or feature extractor, None
        if it has none.

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
    variables = load_variables(folder, model, mesh=mesh, rules=rules)
    return model, variables["params"], family.load_processor(folder)


def load_variables(
    folder: Path,
    model: nn.Module,
    *,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    rng: jax.Array | None = None,
) -> dict[str, Any]:
    """The variables of a model from its checkpoint's folder, {"params"} or {"params", "lora"}.

    Adapters that were saved are folded into the parameters where the model has none. Where it has
    some, it gets those that were saved, or fresh ones.
    model: as the folder's config describes it, with adapters or without. mesh, rules: see
    `from_pretrained`. rng: of fresh adapters.

    Raises:
        ConversionError: the checkpoint is broken, or the model has other parameters or adapters.
    """
    family = families.family_of(folder)
    boxed = families.abstract_variables(family, model)
    expected = unbox(boxed)
    if mesh is None:
        single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: single, expected)
    else:
        shardings = logical_shardings(boxed, mesh, rules)
    params = _load_params(folder, family, model, expected["params"], shardings["params"])
    saved = adapters.saved_in(folder)
    if "lora" not in expected:
        return {"params": params if saved is None else _folded(params, saved, mesh)}
    if saved is not None:
        lora = adapters.load(saved, expected["lora"], shardings["lora"], model.lora.alpha)
    else:
        fresh = jax.jit(
            lambda rng: unbox(family.init(model, rng)["lora"]), out_shardings=shardings["lora"]
        )
        lora = fresh(jax.random.key(0) if rng is None else rng)
    return {"params": params, "lora": lora}


def _load_params(folder: Path, family: ModuleType, model: nn.Module, expected, shardings):
    if stored.is_converted(folder):
        return _load_converted(folder, expected, shardings, model.param_dtype)
    planned = plan(
        _released(folder),
        family.rules(model.config),
        expected,
        ignore=family.IGNORE,
        dtype=model.param_dtype,
        name=str(folder),
    )
    flat = traverse_util.flatten_dict(shardings, sep="/")
    made = {path: place(parameter, flat[path]) for path, parameter in planned.items()}
    return traverse_util.unflatten_dict(made, sep="/")


def _folded(params: Any, saved: Path, mesh: Mesh | None) -> Any:
    """The parameters, whose memory is used, with the saved adapters folded in."""
    whole = None
    if mesh is not None:
        shape = stored.saved_shapes(saved / "variables")["lora"]
        whole = {"lora": jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shape)}
    lora = stored.load_params(saved, whole, collections=("lora",))[0]["lora"]
    alpha = adapters.alpha_of(saved)
    fold = jax.jit(
        lambda params, lora: merge_lora({"params": params, "lora": lora}, alpha)["params"],
        donate_argnums=0,
        out_shardings=jax.tree.map(lambda x: x.sharding, params),
    )
    return fold(params, lora)


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
    variables, _ = stored.load_params(
        folder / stored.PARAMS, {"params": shardings}, dtype, collections=("params",)
    )
    return variables["params"]
