"""The programs between a spoken query and a spoken answer, one for each phase, jitted one by one.

hear (front end) -> reshard (policy weights, where needed) -> rollout (prefill and decode loop) ->
speak (detokenizer). Whoever runs them and whoever compiles them ahead of time use the same objects.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from paras2s_jax.align.policy import Answers, Frontend, SpeechPolicy, texts_of
from paras2s_jax.data.tokenizer import Tokenizer
from paras2s_jax.models.decode import Rollout
from paras2s_jax.models.kimi_audio import Prompt
from paras2s_jax.models.placement import axes_of
from paras2s_jax.train.sharding import (
    ONE_DEVICE,
    ONE_DEVICE_LAYOUTS,
    Layout,
    Layouts,
    Program,
    cast_dtype,
)


@dataclasses.dataclass(frozen=True)
class Call:
    """A program and arguments to lower it with: arrays or ShapeDtypeStructs."""

    program: Program
    args: tuple

    @property
    def name(self) -> str:
        """Of the phase."""
        return self.program.name

    def lower(self) -> jax.stages.Lowered:
        """For compilation ahead of time."""
        return self.program.lower(*self.args)

    def outputs(self) -> Any:
        """Abstract results, arguments of later calls."""
        return self.program.outputs(*self.args)


class Reshard:
    """Policy weights from where they are trained to where, and in what type, decoding wants them.

    A leaf that is so already is passed on as it is; the others go through one program. What is
    frozen is moved once and kept.
    """

    def __init__(self, boxed: Any, layouts: Layouts, dtype: Any = None):
        """boxed: abstract variables of the policy. dtype: of all floats, None: as they come."""
        self._wanted = _flat(layouts.decode.shardings(boxed))
        self._dtype = dtype
        self._programs: dict[tuple, Program] = {}
        self._kept: tuple[dict, dict] = ({}, {})

    def __call__(self, params: Any, frozen: Any = None) -> dict[str, Any]:
        """All variables, to decode with. params, frozen: the two parts of them (train.state)."""
        params, frozen = _flat(params), _flat(frozen or {})
        source = self._kept[0]
        if source.keys() != frozen.keys() or any(source[k] is not frozen[k] for k in frozen):
            self._kept = (frozen, self._move(frozen))
        return traverse_util.unflatten_dict(self._move(params) | self._kept[1], sep="/")

    def _move(self, leaves: dict[str, Any]) -> dict[str, Any]:
        moving = self._moving(leaves)
        return leaves | self._program(moving)(moving) if moving else leaves

    def _moving(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Those that lie elsewhere or have another type."""

        def stays(name, leaf):
            wanted, same = self._wanted[name], leaf.dtype == cast_dtype(leaf.dtype, self._dtype)
            return same and (wanted is None or leaf.sharding.is_equivalent_to(wanted, leaf.ndim))

        return {name: leaf for name, leaf in leaves.items() if not stays(name, leaf)}

    def _program(self, moving: Mapping[str, Any]) -> Program:
        key = tuple(sorted(moving))
        if key not in self._programs:

            def cast(leaves):
                return {
                    name: _on_the_way(
                        leaf.astype(cast_dtype(leaf.dtype, self._dtype)), self._wanted[name]
                    )
                    for name, leaf in leaves.items()
                }

            shardings = {name: self._wanted[name] for name in moving}
            self._programs[key] = Program("reshard", cast, ONE_DEVICE, shardings=shardings)
        return self._programs[key]

    def call(self, params: Any) -> Call | None:
        """What moves at every step, None if nothing does. params: the trained part, abstract."""
        moving = self._moving(_flat(params))
        return Call(self._program(moving), (moving,)) if moving else None

    def outputs(self, variables: Any) -> dict[str, Any]:
        """What decoding is given for abstract variables."""
        leaves = {
            name: jax.ShapeDtypeStruct(
                leaf.shape,
                cast_dtype(leaf.dtype, self._dtype),
                sharding=self._wanted[name],
            )
            for name, leaf in _flat(variables).items()
        }
        return traverse_util.unflatten_dict(leaves, sep="/")


def _on_the_way(x: jax.Array, wanted: NamedSharding | None) -> jax.Array:
    """Spreads an array as it is wanted, and over the other mesh axes besides.

    All that is left is a gather over those. Asked for both steps at once, XLA gives up and holds
    whole matrices on every device: 12 GiB of a 7B model on 8x8 chips.
    """
    if wanted is None:
        return x
    sizes, spec = wanted.mesh.shape, [*wanted.spec, *[None] * (x.ndim - len(wanted.spec))]
    used = {axis for entry in spec for axis in axes_of(entry)}
    rest = tuple(axis for axis in sizes if axis not in used and sizes[axis] > 1)
    ways = math.prod(sizes[axis] for axis in rest)
    for i, (size, entry) in enumerate(zip(x.shape, spec)):
        # A leading axis of layers is never cut in training.
        if rest and entry is None and size % ways == 0 and (i or x.ndim == 2):
            spec[i] = rest
            spread = NamedSharding(wanted.mesh, PartitionSpec(*spec))
            return jax.lax.with_sharding_constraint(x, spread)
    return x


def _flat(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


class Responder:
    """Answers of a policy to spoken queries.

    layouts: the decode loop runs in the one for decoding, all else in the one for training.
    group_size: G. dtype: of the weights while decoding, None: as they are.
    """

    def __init__(
        self,
        policy: SpeechPolicy,
        layouts: Layouts = ONE_DEVICE_LAYOUTS,
        *,
        group_size: int = 1,
        dtype: Any = None,
    ):
        self.policy, self.layouts = policy, layouts
        self.reshard = Reshard(policy.boxed(), layouts, dtype)
        train, decode = layouts.train, layouts.decode
        grouped = functools.partial(decode.rows, grouped=True)

        def hear(frontend, batch):
            return policy.prompt(frontend, batch["query"], batch["query_len"])

        def rollout(variables, prompt, rng):
            return policy.rollout(variables, prompt, jax.random.split(rng)[0], group_size)

        def speak(frontend, rollout, rng):
            return policy.speak(frontend, rollout, jax.random.split(rng)[1])

        self.hear = Program("hear", hear, train, place=train.rows)
        self._rollout = Program(
            "rollout",
            rollout,
            decode,
            place=grouped,
            compiler_options=dict(policy.rollout_options) or None,
        )
        self.speak = Program(
            "speak", speak, train, place=functools.partial(train.rows, grouped=True)
        )

    def __call__(
        self,
        variables: Any,
        frontend: Frontend,
        batch: Mapping[str, Any],
        rng: jax.Array,
    ) -> tuple[Rollout, Answers]:
        """G answers to each query, written and spoken.

        batch: query float32[P, L] at 16 kHz, query_len int32[P]; frontend and batch where the
        layout for training wants them.
        """
        prompt = self.hear(frontend, batch)
        rollout = self.rollout(self.reshard({}, variables), prompt, rng)
        return rollout, self.speak(frontend, rollout, rng)

    def rollout(self, weights: Any, prompt: Prompt, rng: jax.Array) -> Rollout:
        """weights: what `reshard` gives. prompt, rng, result: in the layout for training."""
        decode = self.layouts.decode
        sampled = self._rollout(weights, decode.take(prompt), decode.take(rng))
        return self.layouts.train.take(sampled, grouped=True)

    def calls(
        self, variables: Any, frontend: Frontend, batch: Mapping[str, Any], *, params: Any = None
    ) -> list[Call]:
        """The calls of a step with abstract arguments: reshard only where weights move.

        params: the trained part of the variables; without it nothing moves at every step.
        """
        rng = abstract_key(self.layouts.train)
        hear = Call(self.hear, (frontend, batch))
        moving = self.reshard.call(params) if params else None
        weights = self.reshard.outputs(variables)
        decode, train = self.layouts.decode, self.layouts.train
        rollout = Call(self._rollout, (weights, decode.take(hear.outputs()), decode.take(rng)))
        speak = Call(self.speak, (frontend, train.take(rollout.outputs(), grouped=True), rng))
        return [hear, *([moving] if moving else []), rollout, speak]


def abstract_key(layout: Layout) -> jax.ShapeDtypeStruct:
    """A typed random key, on every device."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=layout.whole)


def make_respond_batch(
    policy: SpeechPolicy,
    variables: Any,
    frontend: Frontend,
    tokenizer: Tokenizer,
    layouts: Layouts = ONE_DEVICE_LAYOUTS,
    *,
    dtype: Any = None,
) -> Callable[
    [np.ndarray, np.ndarray, jax.Array],
    tuple[np.ndarray, np.ndarray, Sequence[str], np.ndarray],
]:
    """One sampled answer per query, as `bench.systems.PolicySystem` wants it.

    layouts, dtype: see Responder.
    Returns: (waves float32[B, L], lens int32[B], rng) -> (waves float32[B, L'], lens int32[B],
    B texts, finished bool[B]).
    """
    respond = Responder(policy, layouts, dtype=dtype)
    variables = layouts.train.place(variables, policy.boxed())
    frontend = layouts.train.place(frontend, policy.boxed_frontend(frontend))

    def respond_batch(waves, lens, rng):
        batch = layouts.train.place_batch({"query": waves, "query_len": lens})
        rollout, answers = respond(variables, frontend, batch, rng)
        texts = [group[0] for group in texts_of(policy, rollout, tokenizer)]
        return (
            np.asarray(answers.waves[:, 0]),
            np.asarray(answers.lens[:, 0]),
            texts,
            np.asarray(rollout.finished[:, 0]),
        )

    return respond_batch
