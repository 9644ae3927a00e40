"""Decoding: speed against transformers' generate, and what sharing prompts and halving save.

On a CPU a 47M Qwen2 in float32; where there is an NVIDIA GPU, also a Qwen2 of 7B's sizes in
bfloat16, against the bandwidth of a copy measured in the same run.
"""

import functools
import os
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from paras2s_jax.convert import qwen2
from paras2s_jax.models import decode
from paras2s_jax.models.generate import generate
from paras2s_jax.models.kimi_audio import KimiAudio, KimiAudioConfig, audio_prompt
from paras2s_jax.models.qwen2 import Qwen2Config, Qwen2LM
from paras2s_jax.models.sampling import Sampling
from paras2s_jax.models.unrolled import decoding_form
from paras2s_jax.perf.race import Race, check_equal, pin, race, shared_variables, with_lengths
from paras2s_jax.stages.registry import Figures

QWEN2_47M = Qwen2Config(16_384, 512, 1536, 10, 8, 2)
QWEN2_7B = Qwen2Config(152_064, 3584, 18_944, 28, 28, 4)  # Qwen2.5-7B
# 32 codes and 40 special ids, two of which end an answer: with random weights every step draws one
# of these with a chance of about 1 in 68, and answers have lengths of all kinds.
POLICY = KimiAudioConfig(
    vocab_size=136,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=64,
    pad_token_id=103,
    kimia_mimo_layers=1,
    kimia_mimo_transformer_from_layer_index=2,
    kimia_token_offset=104,
    kimia_adaptor_input_dim=64,
)


def torch_qwen2(config: Qwen2Config) -> transformers.Qwen2ForCausalLM:
    """A random model of transformers that never ends an answer."""
    torch.manual_seed(0)
    settings = transformers.Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.Qwen2ForCausalLM(settings).eval()


def _prompts(config: Qwen2Config, rows: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(1, config.vocab_size, (rows, size)).astype(np.int32)


def greedy(
    config: Qwen2Config = QWEN2_47M,
    rows: int = 8,
    prompt: int = 32,
    steps: int = 128,
    repeats: int = 5,
) -> Race:
    """Greedy tokens after short prompts, against transformers' generate. float32.

    Our weights are laid out for decoding once, before the race, as torch's lie.
    """
    reference, model = torch_qwen2(config), Qwen2LM(config)
    init = functools.partial(qwen2.init, model, jax.random.key(0))
    variables = shared_variables(model, reference, qwen2.rules(config), init)
    model, variables = decoding_form(model, variables)
    ids = _prompts(config, rows, prompt)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(ids.shape)}

    def answer(mask):
        return generate(
            model, variables, input_ids=ids, attention_mask=mask, max_new_tokens=steps
        ).tokens

    def ours():
        return answer(np.ones(ids.shape, bool))

    @torch.no_grad()
    def theirs():
        out = reference.generate(**inputs, do_sample=False, max_new_tokens=steps)
        return out[:, prompt:].numpy()

    check_equal("decode", ours(), theirs(), 0.0)
    lengths = [np.arange(prompt) >= prompt - n for n in (prompt - 1, prompt // 2, 1)]
    lengths = [np.tile(mask, (rows, 1)) for mask in lengths]
    result = race("decode", ours, theirs, repeats=repeats)
    extra = {"tokens_per_s": rows * steps / min(result.ours_s)}
    return with_lengths(result, answer, lengths, extra)


def group_prefill(
    config: Qwen2Config = QWEN2_47M, prompt: int = 160, group_size: int = 8, repeats: int = 9
) -> float:
    """Seconds to the first tokens of a group of answers per seconds to that of one answer."""
    model = Qwen2LM(config)
    variables = jax.jit(functools.partial(qwen2.init, model))(jax.random.key(0))
    model, variables = decoding_form(model, nn.meta.unbox(variables))
    ids = _prompts(config, 1, prompt)

    def first_tokens(size):
        out = generate(model, variables, input_ids=ids, group_size=size, max_new_tokens=1)
        return out.tokens

    check_equal("prefill", first_tokens(group_size), np.tile(first_tokens(1), (group_size, 1)), 0)
    group, one = (functools.partial(first_tokens, size) for size in (group_size, 1))
    return 1.0 / race("prefill", group, one, repeats=repeats).ratio


def halving(
    config: KimiAudioConfig = POLICY,
    prompts: int = 16,
    group_size: int = 8,
    max_steps: int = 256,
    halvings: int = 3,
    repeats: int = 3,
) -> Figures:
    """Speed of rollouts whose batch halves as answers end, in units of those that keep all rows.

    Answers are those of a random policy, most of them short, a few cut by the limit.
    Returns: "ratio", and "live_share": mean length of the answers per steps of the loop.
    """
    model, rng = KimiAudio(config), np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, config.num_codes, (prompts, 40)), jnp.int32)
    features = jnp.zeros((prompts, 40, config.kimia_adaptor_input_dim))
    prompt = audio_prompt(config, codes, jnp.full(prompts, 40), features)
    ids = jnp.zeros((1, 2), jnp.int32)
    variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), ids, ids))
    settings = {"group_size": group_size, "max_steps": max_steps}
    settings |= {"text": Sampling(), "audio": Sampling()}

    def sampled(halvings):
        run = functools.partial(decode.generate, model, halvings=halvings, **settings)
        return functools.partial(jax.jit(run), variables, prompt, jax.random.key(1))

    halved, whole = sampled(halvings), sampled(0)
    want = whole()
    for name in ("audio_ids", "text_ids"):
        check_equal(f"halving: {name}", getattr(halved(), name), getattr(want, name), 0)
    steps = np.asarray(want.steps)
    result = race("halving", halved, whole, repeats=repeats)
    return {"ratio": result.ratio, "live_share": float(steps.mean() / steps.max())}


def at_7b(
    config: Qwen2Config = QWEN2_7B,
    rows: int = 32,
    prompt: int = 160,
    steps: int = 64,
    repeats: int = 3,
) -> Figures:
    """Decoding of a large model on one GPU, bfloat16, against generate and against copying.

    Returns: "ratio" of the speeds; "copy_share": bytes of weights and keys that a step must read,
    per second, in units of the bytes that a copy moves per second.
    """
    with torch.device("cuda"):
        reference = torch_qwen2(config).to(torch.bfloat16)
    model = Qwen2LM(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    init = functools.partial(qwen2.init, model, jax.random.key(0))
    rules = qwen2.rules(config)
    variables = shared_variables(model, reference, rules, init, dtype=jnp.bfloat16)
    model, variables = decoding_form(model, variables)
    ids = _prompts(config, rows, prompt)
    inputs = {"input_ids": torch.tensor(ids, device="cuda")}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    def ours(steps=steps):
        return generate(model, variables, input_ids=ids, max_new_tokens=steps).tokens

    @torch.no_grad()
    def theirs():
        return reference.generate(**inputs, do_sample=False, max_new_tokens=steps).cpu().numpy()

    with torch.no_grad():
        want = reference(**inputs).logits[:, -1].float().cpu().numpy()
    got = jax.jit(lambda v, ids: model.apply(v, ids)[0][:, -1])(variables, ids)
    # Greedy tokens of random weights in bfloat16 part ways at the first near tie.
    check_equal("decode_7b", got / np.std(want), want / np.std(want), 0.2)
    result = race("decode_7b", ours, theirs, repeats=repeats)
    one = min(_seconds(functools.partial(ours, 1)) for _ in range(repeats + 1))
    step_s = (min(result.ours_s) - one) / (steps - 1)
    weights = sum(x.nbytes for x in jax.tree.leaves(variables)) - 2 * config.vocab_size * (
        config.hidden_size
    )
    kv_width = config.num_key_value_heads * config.width_per_head
    keys = 2 * 2 * kv_width * config.num_hidden_layers * rows * (prompt + steps / 2)
    return {
        "ratio": result.ratio,
        "step_ms": 1e3 * step_s,
        "tokens_per_s": rows / step_s,
        "copy_share": (weights + keys) / step_s / copy_bandwidth(),
    }


def copy_bandwidth(size: int = 1 << 31, repeats: int = 10) -> float:
    """Bytes read and written per second by a copy of `size` bytes on the default device."""
    copy = jax.jit(jnp.negative)
    x = jnp.ones(size // 4, jnp.float32)
    return 2 * size / min(_seconds(functools.partial(copy, x)) for _ in range(repeats))


def _seconds(call) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def run(threads: int = 1) -> Figures:
    """Runs all that the machine can, on `threads` cores, and prints a line for each.

    Returns: figures "decode/…", "prefill/group_ratio", and on a GPU "decode/7b/…".
    """
    # Ours and torch's weights share the GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    pin(threads)
    figures = {}

    def note(prefix: str, found: Figures, line: str) -> None:
        figures.update({f"{prefix}/{key}": value for key, value in found.items()})
        print(line.format(**found), flush=True)

    if torch.cuda.is_available() and jax.default_backend() == "gpu":
        line = (
            "7B sizes: {ratio:.2f} times generate's speed, {copy_share:.2f} of a copy's bandwidth"
        )
        note("decode/7b", at_7b(), line)
    else:
        found = {key.removeprefix("decode/"): x for key, x in greedy().figures().items()}
        note("decode", found, "greedy tokens: {ratio:.2f} times the speed of generate")
    line = "first tokens of 8 answers: {group_ratio:.2f} of the time of one"
    note("prefill", {"group_ratio": group_prefill()}, line)
    line = (
        "halving batches: {ratio:.2f} times the speed, where answers are {live_share:.2f} as long"
    )
    note("decode/halving", halving(), line + " as the longest")
    return figures
