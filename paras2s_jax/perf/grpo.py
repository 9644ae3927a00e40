"""A whole GRPO step on a text-only Qwen2 against TRL's GRPOTrainer (fp32, same threads).

Sampling, trivial rewards, advantages, log-probabilities of the reference and one update, on both
sides from the same weights, prompts, group size and lengths. What surrounds the model here is what
trains the speech policy: losses, advantages and updates of align and train.
"""

import dataclasses
import tempfile
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from paras2s_jax.align.advantages import group_advantages
from paras2s_jax.align.grpo import Settings, make_loss
from paras2s_jax.align.rollout import Experience
from paras2s_jax.convert import qwen2
from paras2s_jax.convert.rules import import_params
from paras2s_jax.models.generate import generate
from paras2s_jax.models.qwen2 import Qwen2LM, last_real
from paras2s_jax.models.sampling import Sampling
from paras2s_jax.models.vocab import token_logp
from paras2s_jax.perf.decode import QWEN2_47M
from paras2s_jax.perf.race import Laps, Race, check_equal, compilations, pin, race
from paras2s_jax.perf.trl_step import ADAM_B2, CLIP_NORM, LR, TheirStep, Work, silent
from paras2s_jax.stages.registry import Figures
from paras2s_jax.train.optimizer import make_optimizer
from paras2s_jax.train.state import TrainState, step_rng
from paras2s_jax.train.step import make_update


@dataclasses.dataclass(frozen=True)
class TextPolicy:
    """A Qwen2LM as `align` sees a policy: prompts in, one stream out.

    A prompt is {"ids": int32[P, T], "mask": bool[P, T]}, padded on the right. max_steps: R.
    ends: ids that end an answer. logp_chunk: see vocab.token_logp.
    """

    model: Qwen2LM
    max_steps: int
    ends: tuple[int, ...] = ()
    logp_chunk: int | None = None

    def rollout(self, variables, prompt, rng: jax.Array, group_size: int) -> dict[str, jax.Array]:
        """Samples at temperature 1. Returns: streams text_out, text_mask of [P, G, R]."""
        made = generate(
            self.model,
            variables,
            input_ids=prompt["ids"],
            attention_mask=prompt["mask"],
            max_new_tokens=self.max_steps,
            group_size=group_size,
            eos_token_ids=self.ends,
            sampling=Sampling(),
            rng=rng,
        )
        shape = (len(prompt["ids"]), group_size, self.max_steps)
        mask = jnp.arange(self.max_steps) < made.lens[:, None]
        return {"text_out": made.tokens.reshape(shape), "text_mask": mask.reshape(shape)}

    def logp(self, variables, prompt, streams, *, at_temperature: bool) -> dict:
        """As SpeechPolicy.logp; the temperature is 1 in any case. A prompt is run once."""
        del at_temperature
        ids, mask = prompt["ids"], prompt["mask"]
        shape = streams["text_out"].shape
        tokens = streams["text_out"].reshape(-1, shape[-1])
        _, out = self.model.apply(variables, ids, attention_mask=mask, emit=("kv",))
        first = jnp.repeat(last_real(out["hidden"], mask), shape[1], axis=0)[:, None]
        start = jnp.repeat(mask.sum(axis=1), shape[1])[:, None]
        _, own = self.model.apply(
            variables,
            tokens[:, :-1],
            position_ids=start + jnp.arange(shape[-1] - 1),
            prefix=out["kv"],
            prefix_mask=mask,
        )
        hidden = jnp.concatenate([first, own["hidden"]], axis=1)
        head = variables["params"]["lm_head"]["kernel"]
        logp, entropy = token_logp(hidden, head, tokens, chunk=self.logp_chunk)
        return {
            "logp": {"text": logp.reshape(shape)},
            "entropy": {"text": entropy.reshape(shape)},
        }


def even_share(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """The reward: which part of an answer's ids is even. [P, G, R] -> float32[P, G]."""
    return jnp.sum((tokens % 2 == 0) & mask, axis=-1) / jnp.maximum(mask.sum(axis=-1), 1)


class OurStep:
    """`step(state, prompt) -> (state, metrics)`, one program per phase."""

    def __init__(self, policy: TextPolicy, reference: Mapping, work: Work, laps: Laps):
        settings = Settings(group_size=work.group, beta=work.beta)
        self._policy, self._reference, self._laps = policy, reference, laps
        self.loss_fn = make_loss(policy, settings)
        self.optimizer = make_optimizer(
            LR, total_steps=1, clip_norm=CLIP_NORM, b2=ADAM_B2, schedule="constant"
        )
        self._rollout = jax.jit(policy.rollout, static_argnums=3)
        self._compare = jax.jit(self._experience)
        self._update = make_update(self.loss_fn, self.optimizer)
        self._group = work.group

    def _experience(self, reference, prompt, streams) -> Experience:
        rewards = even_share(streams["text_out"], streams["text_mask"])
        ref_logp = self._policy.logp(reference, prompt, streams, at_temperature=True)["logp"]
        return Experience(prompt, streams, ref_logp, None, group_advantages(rewards))

    def experience(self, prompt, streams) -> Experience:
        """Rewards, advantages and the reference's log-probabilities of given answers."""
        return self._compare(self._reference, prompt, streams)

    def __call__(self, state: TrainState, prompt):
        args = (state.variables, prompt, step_rng(state), self._group)
        streams = self._laps("rollout", self._rollout, *args)
        experience = self._laps("reference", self.experience, prompt, streams)
        return self._laps("update", self._update, state, experience)


def _as_params(model: Qwen2LM, tensors: Mapping[str, np.ndarray]) -> dict:
    """Weights, or gradients, by torch's names as a tree of ours."""
    shapes = nn.meta.unbox(jax.eval_shape(lambda: qwen2.init(model, jax.random.key(0))))["params"]
    params = import_params(tensors, qwen2.rules(model.config), shapes, name="Qwen2LM")
    return jax.tree.map(jnp.asarray, params)


def _weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def agree(ours: OurStep, theirs: TheirStep, variables: Mapping, prompt) -> dict[str, float]:
    """On answers that TRL sampled: advantages, reference, loss and gradients of both sides.

    Returns: their largest differences; of the gradients in units of their common norm.

    Raises:
        RaceError: one of them is too large.
    """
    batch = theirs.sample()
    num_prompts = len(prompt["ids"])
    tokens = batch["completion_ids"].numpy().astype(np.int32).reshape(num_prompts, ours._group, -1)
    streams = {"text_out": tokens, "text_mask": np.ones(tokens.shape, bool)}
    experience = ours.experience(prompt, streams)
    loss, gradients = theirs.loss_and_gradients(batch)

    @jax.jit
    def mean_loss(variables, experience):
        sums = ours.loss_fn(variables, experience, None)
        return sums.loss_sum / sums.weight

    our_loss, our_gradients = jax.jit(jax.value_and_grad(mean_loss))(variables, experience)
    their_gradients = _as_params(ours._policy.model, gradients)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in gradients.values()))
    pairs = zip(*map(jax.tree.leaves, (our_gradients["params"], their_gradients)), strict=True)
    flat = batch["advantages"].numpy().reshape(experience.advantages.shape)
    ref_logp = batch["ref_per_token_logps"].numpy().reshape(tokens.shape)
    return {
        "advantage_difference": check_equal("advantages", experience.advantages, flat, 1e-3),
        "reference_difference": check_equal(
            "reference", experience.ref_logp["text"], ref_logp, 1e-3
        ),
        "loss_difference": check_equal("loss", our_loss, loss, 1e-5),
        "gradient_difference": max(
            check_equal("gradients", a / norm, b / norm, 1e-4) for a, b in pairs
        ),
    }


def _recompilations(policy: TextPolicy, reference, state: TrainState, work: Work, ids) -> int:
    """Programs compiled from the third step on, when prompts and answers have other lengths."""
    # A hundredth of all ids, so that answers end early and at different steps.
    ends = tuple(range(1, 1 + max(1, work.config.vocab_size // 100)))
    step = OurStep(dataclasses.replace(policy, ends=ends), reference, work, Laps())
    lengths = [work.prompt_len - n for n in (0, 1, work.prompt_len // 2, work.prompt_len - 1, 2)]
    with compilations() as compiled:
        for number, length in enumerate(lengths):
            if number == 2:
                compiled.clear()
            mask = np.tile(np.arange(work.prompt_len) < length, (work.prompts, 1))
            state, _ = step(state, {"ids": ids, "mask": mask})
    return len(compiled)


def measure(work: Work, repeats: int = 5) -> Race:
    """Races a step of ours against one of TRL's, once their answers are known to agree."""
    shape = (work.prompts, work.prompt_len)
    ids = np.random.default_rng(0).integers(1, work.config.vocab_size, shape).astype(np.int32)
    prompt = {"ids": ids, "mask": np.ones(shape, bool)}
    our_laps, their_laps = Laps(), Laps()
    with silent(), tempfile.TemporaryDirectory() as folder:
        theirs = TheirStep(work, ids, folder, their_laps)
    # Unrolled, the layers' gradients are not gathered into stacked arrays step by step.
    model = Qwen2LM(work.config, scan_unroll=work.config.num_hidden_layers)
    policy = TextPolicy(model, work.answer_len)
    variables = {"params": _as_params(policy.model, _weights(theirs.trainer.model))}
    reference = {"params": _as_params(policy.model, _weights(theirs.trainer.ref_model))}
    ours = OurStep(policy, reference, work, our_laps)
    differences = agree(ours, theirs, variables, prompt)
    state = TrainState.create(variables, ours.optimizer, jax.random.key(0))
    del variables

    def our_step():
        nonlocal state
        state, metrics = ours(state, prompt)
        return metrics

    result = race("grpo", our_step, theirs, repeats=repeats)
    spent = their_laps.seconds
    # The agreement sampled once: with it, TRL's parts were called once more than its steps.
    spent["reference"] = [
        whole - part for whole, part in zip(spent.pop("experience"), spent["rollout"], strict=True)
    ]
    extra = differences | our_laps.best_ms("ours") | their_laps.best_ms("theirs")
    extra["theirs_update_ms"] = (
        1e3 * min(result.theirs_s) - extra["theirs_rollout_ms"] - extra["theirs_reference_ms"]
    )
    compiled = result.compiled + _recompilations(policy, reference, state, work, ids)
    return dataclasses.replace(result, compiled=compiled, extra=extra)


def run(
    prompts: int = 1, group: int = 8, prompt_len: int = 160, answer_len: int = 190, threads: int = 1
) -> Figures:
    """Races whole GRPO steps on a 47M Qwen2 and says where the time goes.

    Returns: figures "grpo/ratio" (our speed in units of TRL's), "grpo/recompilations" and others.
    """
    pin(threads)
    result = measure(Work(QWEN2_47M, prompts, group, prompt_len, answer_len))
    figures = result.figures()

    def parts(side):
        names = ("rollout", "reference", "update")
        return ", ".join(f"{name} {figures[f'grpo/{side}_{name}_ms'] / 1e3:.2f}" for name in names)

    print(
        f"{prompts} prompts of {prompt_len} tokens, {group} answers of {answer_len} to each: "
        f"{result.ratio:.2f} times TRL's speed (fastest steps {result.best_ratio:.2f}, in "
        f"processor time {result.cpu_ratio:.2f})\nseconds of ours: {parts('ours')}\n"
        f"seconds of TRL: {parts('theirs')}\n{result.compiled} recompilations after step 2",
        flush=True,
    )
    return figures
