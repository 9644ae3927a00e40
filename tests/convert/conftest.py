"""Tiny releases of each family, written by the reference libraries."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from paras2s_jax.convert.checkpoint import write_checkpoint

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"


def _moved(model: torch.nn.Module) -> torch.nn.Module:
    """Far from the start, where biases are 0 and norms are 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def qwen2(folder: Path, *, shards: bool = False, **changed) -> torch.nn.Module:
    """Qwen2ForCausalLM; all sizes differ."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    model = _moved(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes | changed)))
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
    return model


def _whisper_config() -> transformers.WhisperConfig:
    return transformers.WhisperConfig(
        vocab_size=61,
        num_mel_bins=8,
        d_model=24,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_ffn_dim=44,
        max_source_positions=20,
        max_target_positions=18,
        classifier_proj_size=28,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )


def whisper(folder: Path) -> torch.nn.Module:
    """WhisperForConditionalGeneration with its feature extractor."""
    model = _moved(transformers.WhisperForConditionalGeneration(_whisper_config()))
    model.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    return model


def whisper_classifier(folder: Path) -> torch.nn.Module:
    """WhisperForAudioClassification."""
    model = _moved(transformers.WhisperForAudioClassification(_whisper_config()))
    model.save_pretrained(folder)
    return model


AUDIO = {
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "num_mel_bins": 10,
    "max_source_positions": 20,
}
TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def qwen2_audio(folder: Path) -> torch.nn.Module:
    """Qwen2AudioForConditionalGeneration."""
    config = transformers.Qwen2AudioConfig(
        audio_config=AUDIO, text_config=TEXT, audio_token_index=60
    )
    model = _moved(transformers.Qwen2AudioForConditionalGeneration(config))
    model.save_pretrained(folder)
    return model


def qwen2_5_omni(folder: Path) -> torch.nn.Module:
    """Qwen2_5OmniThinkerForConditionalGeneration."""
    rope = {"rope_type": "default", "rope_theta": 700.0, "mrope_section": [1, 2, 1]}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [0],
    }
    config = transformers.models.qwen2_5_omni.Qwen2_5OmniThinkerConfig(
        audio_config={**AUDIO, "n_window": 5, "output_dim": 32},
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        audio_token_index=60,
    )
    model = _moved(transformers.Qwen2_5OmniThinkerForConditionalGeneration(config))
    model.save_pretrained(folder)
    return model


def wav2vec2(folder: Path) -> torch.nn.Module:
    """Wav2Vec2ForSequenceClassification with weight norm as released checkpoints spell it."""
    config = transformers.Wav2Vec2Config(
        conv_dim=[12, 14],
        conv_kernel=[10, 3],
        conv_stride=[5, 2],
        hidden_size=24,
        num_attention_heads=3,
        num_hidden_layers=2,
        intermediate_size=40,
        num_conv_pos_embeddings=6,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=18,
    )
    model = _moved(transformers.Wav2Vec2ForSequenceClassification(config))
    model.save_pretrained(folder)
    names = (("parametrizations.weight.original0", "weight_g"),)
    names += (("parametrizations.weight.original1", "weight_v"),)
    tensors = {}
    for key, value in model.state_dict().items():
        for new, old in names:
            key = key.replace(new, old)
        tensors[key] = value.numpy()
    write_checkpoint(folder, tensors)
    return model


def _golden(*names: str) -> Callable[[Path], None]:
    """A stored fixture in the layout of a release."""

    def copy(folder: Path) -> None:
        source = GOLDENS.joinpath(*names)
        for file in source.iterdir():
            if file.suffix in (".safetensors", ".json", ".yaml", ".txt"):
                shutil.copyfile(file, folder / file.name)

    return copy


def flow_matching(folder: Path) -> None:
    """The network of Kimi-Audio's detokenizer fixture."""
    source = GOLDENS / "kimi_detokenizer_dit"
    config = json.loads((source / "config.json").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config["audio_detokenizer"]))
    shutil.copyfile(source / "model.safetensors", folder / "model.safetensors")


RELEASES: dict[str, Callable[..., object]] = {
    "qwen2": qwen2,
    "qwen2_audio": qwen2_audio,
    "qwen2_5_omni": qwen2_5_omni,
    "speech_tokenizer": _golden("glm4_voice_tokenizer"),
    "whisper": whisper,
    "whisper_classifier": whisper_classifier,
    "wav2vec2": wav2vec2,
    "emotion2vec": _golden("emotion2vec", "base"),
    "kimi_audio": _golden("kimi_lm"),
    "flow_matching": flow_matching,
    "bigvgan": _golden("bigvgan"),
}


@pytest.fixture(scope="session")
def release(tmp_path_factory):
    """`release(family, **options)` -> (folder, the reference's model); written once, read only."""
    made = {}

    def get(family: str, **options):
        key = (family, json.dumps(options, sort_keys=True))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            made[key] = (folder, RELEASES[family](folder, **options))
        return made[key]

    return get
