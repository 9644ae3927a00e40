"""The programs of a stage with abstract arguments: the very objects that the stage runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from paras2s_jax.align import distill, grpo, sft
from paras2s_jax.align.phases import Call, Responder
from paras2s_jax.align.rewards import make_reward_fn
from paras2s_jax.audio.mel import RATE_HZ
from paras2s_jax.models.sampling import Sampling
from paras2s_jax.plan.hardware import PlanError
from paras2s_jax.stages import assembly
from paras2s_jax.stages.policy import optimizer_of
from paras2s_jax.stages.reward_model import outline_reward_model
from paras2s_jax.train.sharding import Layouts
from paras2s_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Programs:
    """Calls of one step in their order, and what lies on the devices all the while.

    resident: trees of ShapeDtypeStructs with shardings, by name. trained_params: how many numbers
    the optimizer updates.
    """

    calls: Sequence[Call]
    resident: Mapping[str, Any]
    trained_params: int = 0

    def call(self, name: str) -> Call:
        """The call of that phase."""
        return next(call for call in self.calls if call.name == name)

    def arguments(self, call: Call) -> dict[str, int]:
        """Bytes on one device of the call's arguments, what is resident by its name."""
        given = {id(leaf): leaf for leaf in jax.tree.leaves(call.args)}
        named = {}
        for name, tree in self.resident.items():
            mine = [given.pop(id(leaf), None) for leaf in jax.tree.leaves(tree)]
            named[name] = sum(device_bytes(leaf) for leaf in mine if leaf is not None)
        named["inputs"] = sum(device_bytes(leaf) for leaf in given.values())
        return {name: size for name, size in named.items() if size}

    def others(self, call: Call) -> dict[str, int]:
        """Bytes on one device of what is resident and no argument of the call.

        What two of them share counts for the first.
        """
        known = {id(leaf) for leaf in jax.tree.leaves(call.args)}
        sizes = dict.fromkeys(self.resident, 0)
        for name, tree in self.resident.items():
            for leaf in jax.tree.leaves(tree):
                if id(leaf) not in known:
                    sizes[name] += device_bytes(leaf)
                    known.add(id(leaf))
        return {name: size for name, size in sizes.items() if size}


def device_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """What one device holds of an array."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * (leaf.dtype.itemsize if hasattr(leaf.dtype, "itemsize") else 8)


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def layouts_for(config: ConfigDict, devices: Sequence[Any]) -> Layouts:
    """The layouts of a config over given devices.

    Raises:
        PlanError: a mesh is for another number of devices.
    """
    for name in ("mesh", "decode_mesh"):
        sizes = config[name].to_dict()
        count = math.prod(sizes.values())
        if count != len(devices):
            raise PlanError(
                f"config.{name} {sizes} is for {count} devices, the topology has {len(devices)}: "
                f"set --config.{name}.data, .fsdp and .tensor."
            )
    return assembly.layouts_of(config, devices)


def _rows(layouts: Layouts, **shapes: tuple) -> dict[str, jax.ShapeDtypeStruct]:
    """Abstract arrays of a batch, spread by rows: name=(dtype, *shape)."""
    tree = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, *shape) in shapes.items()}
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        layouts.train.rows(tree),
    )


def _waves(layouts: Layouts, rows: int, **seconds: float) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = {name: (jnp.float32, rows, round(s * RATE_HZ)) for name, s in seconds.items()}
    lens = {f"{name}_len": (jnp.int32, rows) for name in seconds}
    return _rows(layouts, **shapes, **lens)


def _policy(config: ConfigDict, layouts: Layouts) -> tuple[assembly.Assembly, Any, Any]:
    """A policy, its abstract variables and front end."""
    made, layout = assembly.outline(config, layouts), layouts.train
    frontend = layout.abstract(made.policy.boxed_frontend(made.frontend))
    return made, layout.abstract(made.policy.boxed()), frontend


def _grpo(config: ConfigDict, layouts: Layouts) -> Programs:
    c = config.grpo
    made, variables, frontend = _policy(config, layouts)
    reward_model = outline_reward_model(config)
    reward_variables = layouts.train.abstract(reward_model.boxed())
    fields = {field.name for field in dataclasses.fields(grpo.Settings)}
    optimizer = optimizer_of(c, c.num_epochs)
    state = TrainState.abstract(variables, optimizer, trainable=made.trainable)
    reference = made.frozen(variables)
    update = grpo.GrpoUpdate(
        made.policy,
        reference,
        frontend,
        make_reward_fn(reward_model),
        reward_variables,
        optimizer,
        grpo.Settings(**{key: value for key, value in c.items() if key in fields}),
        layouts=layouts,
        rollout_dtype=jnp.dtype(config.policy.dtype),
    )
    batch = _waves(layouts, c.num_prompts, query=max(c.len_buckets_s))
    return Programs(
        update.calls(state, batch),
        {
            "policy": (state.params, state.frozen),
            "optimizer": state.opt_state,
            "reference": reference,
            "reward model": reward_variables,
            "front end": frontend,
        },
        _count(state.params),
    )


def _sft(config: ConfigDict, layouts: Layouts) -> Programs:
    c = config.sft
    made, variables, frontend = _policy(config, layouts)
    optimizer = optimizer_of(c)
    state = TrainState.abstract(variables, optimizer, trainable=made.trainable)
    query_s, answer_s = min(c.len_buckets_s), max(c.len_buckets_s)
    batch = _waves(layouts, c.batch_size, query=query_s, answer=answer_s)
    batch |= _rows(
        layouts,
        text_ids=(jnp.int32, c.batch_size, max(c.token_buckets)),
        text_ids_len=(jnp.int32, c.batch_size),
    )
    calls = sft.calls(
        made.policy,
        frontend,
        optimizer,
        state,
        batch,
        layout=layouts.train,
        accum_steps=c.accum_steps,
    )
    resident = {
        "policy": (state.params, state.frozen),
        "optimizer": state.opt_state,
        "front end": frontend,
    }
    return Programs(calls, resident, _count(state.params))


def _distill(config: ConfigDict, layouts: Layouts) -> Programs:
    c = config.distill
    model = outline_reward_model(config)
    variables = layouts.train.abstract(model.boxed())
    optimizer = optimizer_of(c)
    state = TrainState.abstract(variables, optimizer, trainable=c.trainable)
    batch = _waves(layouts, c.batch_size, query=min(c.pair_buckets_s), answer=max(c.pair_buckets_s))
    kinds = {"score": jnp.float32, "style": jnp.int32, "tone": jnp.int32}
    batch |= _rows(layouts, **{name: (kind, c.batch_size) for name, kind in kinds.items()})
    calls = distill.calls(
        model,
        optimizer,
        state,
        batch,
        layout=layouts.train,
        findings_weight=c.findings_weight,
        accum_steps=c.accum_steps,
    )
    resident = {"reward model": (state.params, state.frozen), "optimizer": state.opt_state}
    return Programs(calls, resident, _count(state.params))


def _respond(config: ConfigDict, layouts: Layouts) -> Programs:
    """As distillation samples: many answers to a query."""
    c = config.distill
    made, variables, frontend = _policy(config, layouts)
    policy = dataclasses.replace(
        made.policy, text=Sampling(**c.text_sampling), audio=Sampling(**c.audio_sampling)
    )
    responder = Responder(
        policy, layouts, group_size=c.num_samples, dtype=jnp.dtype(config.policy.dtype)
    )
    batch = _waves(layouts, c.sample_batch_size, query=max(c.len_buckets_s))
    calls = responder.calls(variables, frontend, batch)
    return Programs(calls, {"policy": variables, "front end": frontend})


STAGES: dict[str, Callable[[ConfigDict, Layouts], Programs]] = {
    "grpo": _grpo,
    "sft": _sft,
    "distill": _distill,
    "respond": _respond,
}


def build(config: ConfigDict, stage: str, devices: Sequence[Any]) -> Programs:
    """The programs of a stage for given devices, which need not exist.

    Raises:
        PlanError: the config's mesh is for another number of devices.
    """
    return STAGES[stage](config, layouts_for(config, devices))
