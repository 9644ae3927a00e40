"""Kimi-Audio at random sizes against plain torch: one Qwen2 per stream on common embeddings.

The reference's text logits are those of a Qwen2 with the main layers, its audio logits those of a
Qwen2 with the shared and the MIMO layers (goldens/kimi_lm/README.md).
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from paras2s_jax.convert import kimi_audio as table
from paras2s_jax.convert.rules import export_params, import_params
from paras2s_jax.models import decode
from paras2s_jax.models.kimi_audio import (
    KimiAudio,
    KimiAudioConfig,
    collate_prompts,
    init_cache,
    prompt_layout,
)
from paras2s_jax.models.sampling import Sampling

FIRST, PAD, OFFSET, CODES = 30, 75, 76, 24
STEPS = 64
LENGTHS = ((5, 3), (7,), (1,))  # Codes of the audio messages of each row.


def _config(hidden, heads, kv_heads, mlp, layers, branch, mimo, adaptor, theta, delay):
    return KimiAudioConfig(
        vocab_size=OFFSET + CODES,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_theta=theta,
        bos_token_id=FIRST,
        pad_token_id=PAD,
        kimia_mimo_layers=mimo,
        kimia_mimo_audiodelaytokens=delay,
        kimia_mimo_transformer_from_layer_index=branch,
        kimia_token_offset=OFFSET,
        kimia_adaptor_input_dim=adaptor,
    )


CONFIGS = {
    "five queries per key": _config(40, 5, 1, 56, 4, 1, 2, 12, 1e6, 6),
    "branch after one layer": _config(48, 4, 2, 32, 3, 0, 3, 20, 1e4, 5),
    "no grouping": _config(36, 6, 6, 72, 3, 1, 1, 44, 5e5, 2),
}


@dataclasses.dataclass
class Reference:
    """The torch models, and the same weights under the released names."""

    config: KimiAudioConfig
    text: Qwen2ForCausalLM
    audio: Qwen2ForCausalLM
    adaptor: torch.nn.Sequential

    @classmethod
    def random(cls, config: KimiAudioConfig) -> "Reference":
        torch.manual_seed(config.hidden_size)
        sizes = config.stack_sizes

        def qwen2(layers):
            c = Qwen2Config(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_key_value_heads,
                rms_norm_eps=config.rms_norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                tie_word_embeddings=False,
                attn_implementation="eager",
            )
            return Qwen2ForCausalLM(c).eval()

        width = config.hidden_size
        adaptor = torch.nn.Sequential(
            torch.nn.Linear(config.kimia_adaptor_input_dim, width),
            torch.nn.SiLU(),
            torch.nn.Dropout(0.0),
            torch.nn.Linear(width, width),
            torch.nn.LayerNorm(width, eps=config.rms_norm_eps),
        ).eval()
        text = qwen2(sizes["trunk"] + sizes["text_tail"])
        audio = qwen2(sizes["trunk"] + sizes["audio_tail"])
        ids = config.special
        with torch.no_grad():
            for module in (text, audio, adaptor):
                for parameter in module.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            audio.model.embed_tokens.weight.copy_(text.model.embed_tokens.weight)
            for i in range(sizes["trunk"]):
                audio.model.layers[i].load_state_dict(text.model.layers[i].state_dict())
            # Their logits are 0, so that no greedy answer ends before its last step.
            audio.lm_head.weight[[ids.msg_end, ids.media_end]] = 0.0
            text.lm_head.weight[ids.kimia_text_eos] = 0.0
        return cls(config, text, audio, adaptor)

    def tensors(self) -> dict[str, np.ndarray]:
        trunk = self.config.stack_sizes["trunk"]
        named = dict(self.text.state_dict())
        for key, value in self.audio.state_dict().items():
            parts = key.split(".")
            if parts[1] == "layers" and int(parts[2]) >= trunk:
                number = int(parts[2]) - trunk
                named[".".join(["model.mimo_layers", str(number), *parts[3:]])] = value
        named["model.mimo_norm.weight"] = self.audio.model.norm.weight
        named["mimo_output.weight"] = self.audio.lm_head.weight
        for key, value in self.adaptor.state_dict().items():
            named[f"model.vq_adaptor.layers.{key}"] = value
        return {key: value.detach().numpy() for key, value in named.items()}

    @torch.no_grad()
    def logits(self, layout: dict, features: list, answer: dict | None = None, mask=None):
        """(audio, text) logits of one row: steps 1 to 3 of the README, then both Qwen2s."""
        embed = self.text.model.embed_tokens
        audio_ids = torch.tensor(layout["audio_ids"])
        x = embed(audio_ids)
        ends = np.flatnonzero(np.array(layout["audio_ids"]) == self.config.special.media_end)
        for end, feature in zip(ends, features, strict=True):
            at = slice(end - len(feature), end)
            x[at] = (x[at] + self.adaptor(torch.tensor(feature))) * 2**0.5
        x = x + embed(torch.tensor(layout["text_ids"]))
        if answer is not None:
            fed = torch.tensor(answer["text"])
            # One call per token in the reference, which leaves text id 0 out.
            text = embed(fed) * (fed != 0)[:, None]
            x = torch.cat([x, embed(torch.tensor(answer["audio"])) + text])
        mask = None if mask is None else torch.tensor(mask)[None].long()
        places = torch.arange(len(x))[None]
        return tuple(
            model(inputs_embeds=x[None], attention_mask=mask, position_ids=places).logits[0].numpy()
            for model in (self.audio, self.text)
        )


@dataclasses.dataclass
class Case:
    """A reference, our parameters of it, and prompts of several rows."""

    reference: Reference
    variables: dict
    layouts: list[dict]
    features: list[list[np.ndarray]]

    @property
    def config(self) -> KimiAudioConfig:
        return self.reference.config


@pytest.fixture(scope="module", params=list(CONFIGS))
def case(request) -> Case:
    reference = Reference.random(CONFIGS[request.param])
    config, rng = reference.config, np.random.default_rng(1)
    tensors = reference.tensors()
    shapes = jax.eval_shape(functools.partial(table.init, KimiAudio(config)), jax.random.key(0))
    params = import_params(tensors, table.rules(config), nn.unbox(shapes)["params"])
    back = export_params(params, table.rules(config))
    assert set(back) == set(tensors)
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)
    layouts, features = [], []
    for lengths in LENGTHS:
        messages = [
            {"role": "user", "message_type": "audio", "content": rng.integers(0, CODES, n).tolist()}
            for n in lengths
        ]
        words = {"role": "user", "message_type": "text", "content": [5, 0, 9]}
        layouts.append(prompt_layout(config, [words, *messages]))
        width = config.kimia_adaptor_input_dim
        features.append([rng.normal(size=(n, width)).astype(np.float32) for n in lengths])
    return Case(reference, {"params": params}, layouts, features)


def _batch(case: Case, left: bool) -> dict:
    """The rows padded to one length, under the reference's names."""
    longest = max(len(layout["audio_ids"]) for layout in case.layouts)

    def pad(values, fill):
        widths = (longest - len(values), 0) if left else (0, longest - len(values))
        return np.pad(values, widths, constant_values=fill)

    rows = case.layouts
    width, per_row = case.config.kimia_adaptor_input_dim, max(map(len, case.features))
    # One frame more than any segment has, and junk where a row has no such segment.
    junk = np.full((per_row, len(rows), 9, width), 7.0, np.float32)
    for row, features in enumerate(case.features):
        for k, feature in enumerate(features):
            junk[k, row, : len(feature)] = feature
    return {
        "input_ids": np.stack([pad(row["audio_ids"], PAD) for row in rows]),
        "text_input_ids": np.stack([pad(row["text_ids"], PAD) for row in rows]),
        "whisper_input_feature": list(junk),
        "is_continuous_mask": np.stack(
            [pad(np.array(row["is_continuous_mask"], np.int32), 0) for row in rows]
        ),
        "attention_mask": np.stack([pad(np.ones(len(row["audio_ids"]), int), 0) for row in rows]),
    }


@pytest.mark.parametrize("left", [False, True])
def test_padded_batch_with_features_equals_torch_row_by_row(case, left):
    batch = _batch(case, left)
    run = jax.jit(lambda variables, batch: KimiAudio(case.config).apply(variables, **batch)[0])
    audio, text = run(case.variables, batch)
    for row, (layout, features) in enumerate(zip(case.layouts, case.features, strict=True)):
        real = batch["attention_mask"][row] == 1
        wants = case.reference.logits(layout, features)
        assert np.std(wants[0]) > 0.3 and np.std(wants[1]) > 0.3
        for got, want in zip((audio, text), wants, strict=True):
            np.testing.assert_allclose(got[row][real], want, atol=1e-4)


def test_bfloat16_stays_near_float32(case):
    batch = _batch(case, left=False)
    real = batch["attention_mask"] == 1

    def run(dtype):
        model = KimiAudio(case.config, dtype=dtype)
        return jax.jit(lambda variables, batch: model.apply(variables, **batch)[0])(
            case.variables, batch
        )

    for a, b in zip(run(jnp.float32), run(jnp.bfloat16), strict=True):
        assert b.dtype == jnp.float32
        error, size = np.asarray(a - b)[real], np.asarray(a)[real]
        assert 0 < np.sqrt(np.mean(error**2)) < 2e-2 * np.sqrt(np.mean(size**2))


def test_64_greedy_steps_equal_torch_without_a_cache(case):
    config, greedy = case.config, Sampling(temperature=0.0)
    prompt = collate_prompts(config, case.layouts, case.features)
    run = functools.partial(
        decode.generate,
        KimiAudio(config),
        group_size=1,
        max_steps=STEPS,
        text=greedy,
        audio=greedy,
    )
    key = jax.random.key(0)
    out = jax.tree.map(lambda x: np.asarray(x)[:, 0], jax.jit(run)(case.variables, prompt, key))
    assert out.steps.tolist() == [STEPS] * len(LENGTHS)
    # Not one id over and over.
    for ids in (out.audio_ids[out.audio_mask], out.text_ids[out.text_mask]):
        assert len(set(ids.tolist())) > 4
    for row, (layout, features) in enumerate(zip(case.layouts, case.features, strict=True)):
        # Step i is predicted at the last position of the prompt plus i fed tokens.
        fed = {"audio": out.audio_ids[row, :-1], "text": out.text_ids[row, :-1]}
        logits = case.reference.logits(layout, features, fed)
        start = len(layout["audio_ids"]) - 1
        for stream, scores in zip(("audio", "text"), logits, strict=True):
            ids = getattr(out, f"{stream}_ids")[row]
            drawn = getattr(out, f"{stream}_mask")[row]
            assert drawn.sum() == STEPS - (config.delay if stream == "audio" else 0)
            np.testing.assert_array_equal(ids[drawn], scores[start:].argmax(-1)[drawn], stream)
            shifted = scores[start:] - scores[start:].max(-1, keepdims=True)
            logp = -np.log(np.exp(shifted).sum(-1))  # of the best id
            got = getattr(out, f"{stream}_logp")[row]
            np.testing.assert_allclose(got[drawn], logp[drawn], atol=1e-4, err_msg=stream)


@pytest.mark.parametrize("case", ["five queries per key"], indirect=True)
def test_cached_calls_of_several_tokens_equal_one_call(case):
    """A cache filled in calls of 4, 3, 1, 1, … tokens, features in the first two."""
    config, layout = case.config, case.layouts[0]
    row = {key: np.array(layout[key])[None] for key in ("audio_ids", "text_ids")}
    want = case.reference.logits(layout, case.features[0])
    placed = collate_prompts(config, [layout], [case.features[0]])
    size = row["audio_ids"].shape[1]
    features = np.pad(placed.features, ((0, 0), (0, 1), (0, 0)))
    heard = np.pad(placed.continuous_mask, ((0, 0), (0, 1)))

    @jax.jit
    def step(variables, cache, index, audio_ids, text_ids, features, heard):
        return KimiAudio(config).apply(
            variables,
            audio_ids,
            text_ids,
            features=features,
            continuous_mask=heard,
            cache=cache,
            cache_index=index,
            method="hidden",
        )

    heads = jax.jit(
        lambda variables, audio, text: (
            KimiAudio(config).apply(variables, audio, method="audio_logits"),
            KimiAudio(config).apply(variables, text, method="text_logits"),
        )
    )
    cache, at = init_cache(config, rows=1, size=size + 2), 0
    for length in (4, 3, *[1] * (size - 7)):
        now = slice(at, at + length)
        inputs = (row["audio_ids"][:, now], row["text_ids"][:, now], features[:, now])
        hidden, out = step(case.variables, cache, jnp.int32(at), *inputs, heard[:, now])
        for got, expected in zip(heads(case.variables, *hidden), want, strict=True):
            np.testing.assert_allclose(got[0], expected[now], atol=1e-4)
        cache, at = out["cache"], at + length
