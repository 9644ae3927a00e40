"""Released models of random weights, tiny, in the layouts and file names of their releases."""

import base64
import functools
import json
import runpy
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
import yaml
from safetensors.numpy import load_file, save_file

from paras2s_jax.convert import folders, kimi_audio
from paras2s_jax.convert.rules import export_params, write_checkpoint
from paras2s_jax.data.tiktoken_vocabulary import SPECIAL_OFFSETS
from paras2s_jax.models.kimi_audio import KimiAudio, KimiAudioConfig

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"
# 256 bytes and four pairs of them, a block of 40 special tokens, 32 codes of speech.
NUM_RANKS, NUM_SPECIAL, NUM_CODES = 260, 40, 32
OFFSET = NUM_RANKS + NUM_SPECIAL


@pytest.fixture(scope="session")
def release(tmp_path_factory) -> Path:
    """The folder as a user downloads it, and the speech tokenizer's release inside it."""
    folder = tmp_path_factory.mktemp("release") / "Kimi-Audio-Tiny"
    write_language_model(folder)
    write_vocabulary(folder)
    write_whisper(folder / "whisper-large-v3")
    write_speech_tokenizer(folder / "glm-4-voice-tokenizer")
    write_detokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def converted(release, tmp_path_factory) -> Path:
    """The release as `paras2s convert` leaves it."""
    target = tmp_path_factory.mktemp("converted") / release.name
    folders.convert(str(release), str(target))
    return target


def write_language_model(folder: Path) -> None:
    folder.mkdir(parents=True)
    config = {
        "architectures": ["MoonshotKimiaForCausalLM"],
        "model_type": "moonshot_kimia",
        "vocab_size": OFFSET + NUM_CODES,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "bos_token_id": NUM_RANKS,
        "pad_token_id": OFFSET - 1,
        "kimia_mimo_layers": 2,
        "kimia_mimo_audiodelaytokens": 6,
        "kimia_mimo_transformer_from_layer_index": 1,
        "kimia_token_offset": OFFSET,
        "kimia_adaptor_input_dim": 96,
        "kimia_media_begin": NUM_RANKS + 18,
        "kimia_media_end": NUM_RANKS + 20,
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = KimiAudio(KimiAudioConfig.from_json(folder / "config.json"))
    init = jax.jit(functools.partial(kimi_audio.init, model))
    params = nn.unbox(init(jax.random.key(0)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.asarray(x) + rng.normal(0, 0.1, x.shape), params)
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    # Ids that end the speech or are no speech come hardly ever: answers are heard.
    head = params["audio_head"]["kernel"]
    head[:, :OFFSET] *= 0.1
    tensors = export_params(params, kimi_audio.rules(model.config))
    for stack, layers in (("layers", 4), ("mimo_layers", 2)):
        for i in range(layers):
            key = f"model.{stack}.{i}.self_attn.rotary_emb.inv_freq"
            tensors[key] = np.ones(4, np.float32)
    write_checkpoint(folder, tensors, max_shard_bytes=50_000)


def write_vocabulary(folder: Path) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"in"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    listed = {
        str(NUM_RANKS + at): {"content": name, "special": True}
        for name, at in SPECIAL_OFFSETS.items()
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))


def write_whisper(folder: Path) -> None:
    """A whole Whisper, as the release has; its encoder is the fixture's."""
    config = transformers.WhisperConfig(
        d_model=24,
        encoder_layers=2,
        encoder_attention_heads=3,
        encoder_ffn_dim=96,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=8,
        num_mel_bins=128,
        vocab_size=64,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config)
    encoder = load_file(GOLDENS / "whisper_frontend" / "model.safetensors")
    found = model.load_state_dict({k: torch.tensor(v) for k, v in encoder.items()}, strict=False)
    assert not found.unexpected_keys
    assert not any(key.startswith("model.encoder.") for key in found.missing_keys)
    model.save_pretrained(folder)


def write_speech_tokenizer(folder: Path) -> None:
    """The fixture's, with positions for 30 s as in the release."""
    folder.mkdir()
    source = GOLDENS / "glm4_voice_tokenizer"
    config = json.loads((source / "config.json").read_text())
    config = config["encoder"] | {"architectures": config["architectures"]}
    config["max_source_positions"] = 1500
    (folder / "config.json").write_text(json.dumps(config))
    tensors, rng = load_file(source / "model.safetensors"), np.random.default_rng(0)
    for name, size in (("embed_positions.weight", 1500), ("embed_positions2.weight", 375)):
        known = tensors[name]
        more = rng.normal(0, 0.1, (size - len(known), known.shape[1])).astype(np.float32)
        tensors[name] = np.concatenate([known, more])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_detokenizer(folder: Path) -> None:
    """The fixture's networks as .pt files."""
    source = GOLDENS / "kimi_detokenizer_dit"
    config = json.loads((source / "config.json").read_text())
    parts = {"audio_detokenizer": "state_dict", "vocoder": "generator"}
    files = {"audio_detokenizer": "model.safetensors", "vocoder": "vocoder.safetensors"}
    for name, key in parts.items():
        (folder / name).mkdir()
        tensors = {k: torch.tensor(v) for k, v in load_file(source / files[name]).items()}
        torch.save({key: tensors, "step": 7}, folder / name / "model.pt")
    # The file names settings that the official inference ignores.
    settings = config["audio_detokenizer"] | {"ode_steps": 150, "cfg_scale": 4.0}
    (folder / "audio_detokenizer" / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "vocoder" / "config.json").write_text(json.dumps(config["vocoder"]))


@pytest.fixture
def broken_release(release, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(release, tmp_path / release.name))


CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
AUDIO_TOKENS = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
# As the release's, for one system and one user turn with text and audio in it.
CHAT = """\
{%- for turn in messages -%}
{{ "<|im_start|>" + turn.role + "\\n" }}
{%- for part in turn.content -%}
{%- if part.type == "audio" -%}
{{ "<|audio_bos|><|AUDIO|><|audio_eos|>" }}
{%- else -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{{ "<|im_end|>\\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ "<|im_start|>assistant\\n" }}
{%- endif -%}
"""


@pytest.fixture(scope="session")
def omni(tmp_path_factory) -> Path:
    """A thinker of Qwen2.5-Omni of random weights, with tokenizer and template as released."""
    folder = tmp_path_factory.mktemp("omni") / "Qwen2.5-Omni-Tiny"
    slot = write_chat(folder)
    rope = {"rope_type": "default", "rope_theta": 700.0, "mrope_section": [1, 2, 1]}
    config = transformers.models.qwen2_5_omni.Qwen2_5OmniThinkerConfig(
        audio_config={
            "d_model": 24,
            "encoder_layers": 2,
            "encoder_attention_heads": 3,
            "encoder_ffn_dim": 40,
            "num_mel_bins": 16,
            "n_window": 20,
            "output_dim": 32,
        },
        text_config={
            "vocab_size": slot + 10,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": rope,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 12,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
        audio_token_index=slot,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    model.save_pretrained(folder)
    return folder


def write_chat(folder: Path) -> int:
    """Byte-level tokenizer, feature extractor and template. Returns: the audio token's id."""
    folder.mkdir(parents=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({mark: i for i, mark in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    fast.add_special_tokens({"additional_special_tokens": CONTROL + AUDIO_TOKENS})
    fast.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=16).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT)
    return fast.convert_tokens_to_ids("<|AUDIO|>")


@pytest.fixture(scope="session")
def load_config():
    """`load_config(name, arg)`: a config of the repository."""

    def load(name: str, arg: str | None = None):
        return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](arg)

    return load
