"""Makes the fixtures of this folder with funasr's own emotion2vec (1.4.16; torch 2.13).

Each folder is laid out as a release. io.npz has four clips, as waves (i/wave), and what the model
makes of each alone: frames (i/x), their mean (i/feats), scores (i/logits). The folders plus_base
and plus_large hold no weights but the names and shapes of a release's tensors.

    pip download --no-deps funasr -d /tmp/funasr && unzip -d /tmp/funasr /tmp/funasr/funasr-*.whl
    pip install omegaconf
    python tests/goldens/emotion2vec/make.py /tmp/funasr

funasr as a whole pulls in dozens of packages; only its folder models/emotion2vec is loaded here.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

HERE = Path(__file__).parent
LENS = (393, 170, 60, 401)

AUDIO = {
    "type": "AUDIO",
    "prenet_depth": 2,
    "prenet_layerdrop": 0.05,
    "prenet_dropout": 0.1,
    "start_drop_path_rate": 0.0,
    "end_drop_path_rate": 0.0,
    "num_extra_tokens": 3,
    "init_extra_token_zero": True,
    "mask_prob": 0.5,
    "mask_noise_std": 0.01,
    "mask_channel_prob": 0.0,
    "encoder_zero_mask": True,
    "local_grad_mult": 1.0,
    "use_alibi_encoder": True,
    "alibi_scale": 1.0,
    "learned_alibi": False,
    "alibi_max_pos": None,
    "learned_alibi_scale": True,
    "learned_alibi_scale_per_head": True,
    "learned_alibi_scale_per_layer": False,
    "num_alibi_heads": 3,
    "model_depth": 3,
    "decoder": None,
    "extractor_mode": "layer_norm",
    "feature_encoder_spec": "[(12, 10, 5)] + [(14, 3, 2)] + [(10, 2, 2)] * 1",
    "conv_pos_width": 15,
    "conv_pos_groups": 4,
    "conv_pos_depth": 3,
    "conv_pos_pre_ln": False,
}
MODEL = {
    "depth": 3,
    "start_drop_path_rate": 0.0,
    "end_drop_path_rate": 0.0,
    "num_heads": 3,
    "norm_eps": 1e-5,
    "norm_affine": True,
    "encoder_dropout": 0.1,
    "post_mlp_drop": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "dropout_input": 0.0,
    "layerdrop": 0.05,
    "embed_dim": 24,
    "mlp_ratio": 1.5,
    "layer_norm_first": False,
    "end_of_block_targets": False,
    "clone_batch": 8,
    "normalize": True,
}
# Per fixture: what differs in the model, in its audio part, and the number of labels.
CASES = {
    "base": ({}, {}, 9),
    "per_layer": (
        {"num_heads": 5, "embed_dim": 40, "depth": 2},
        {
            "num_alibi_heads": 5,
            "learned_alibi_scale_per_head": False,
            "learned_alibi_scale_per_layer": True,
            "model_depth": 2,
            "num_extra_tokens": 1,
            "conv_pos_width": 16,
            "conv_pos_depth": 2,
        },
        4,
    ),
    "group_norm": (
        {"num_heads": 6, "mlp_ratio": 2.0, "norm_eps": 1e-3},
        {
            "num_alibi_heads": 2,
            "learned_alibi_scale_per_layer": True,
            "extractor_mode": "default",
            "num_extra_tokens": 0,
            "prenet_depth": 1,
            "model_depth": 3,
        },
        3,
    ),
    "no_head": (
        {"num_heads": 4},
        {"use_alibi_encoder": False, "prenet_depth": 3, "conv_pos_width": 3},
        0,
    ),
}
# Sizes of emotion2vec_plus_base (funasr's template.yaml) and of emotion2vec_plus_large. Of the
# latter's config.yaml, embed_dim, depth, decoder_dim and conv_pos_* are known to the writer, and 16
# heads and a prenet of 4 taken for granted.
RELEASED_AUDIO = {
    "prenet_depth": 4,
    "num_extra_tokens": 10,
    "model_depth": 8,
    "feature_encoder_spec": "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
    "conv_pos_width": 95,
    "conv_pos_groups": 16,
    "conv_pos_depth": 5,
}
DECODER = {
    "decoder_groups": 16,
    "decoder_kernel": 7,
    "decoder_layers": 4,
    "input_dropout": 0.1,
    "add_positions_masked": False,
    "add_positions_all": False,
    "decoder_residual": True,
    "projection_layers": 1,
    "projection_ratio": 2.0,
}
RELEASED = {
    "plus_base": (
        {"depth": 8, "num_heads": 12, "embed_dim": 768, "mlp_ratio": 4.0},
        {"num_alibi_heads": 12, "decoder": {"decoder_dim": 384, **DECODER}},
    ),
    "plus_large": (
        {"depth": 8, "num_heads": 16, "embed_dim": 1024, "mlp_ratio": 4.0},
        {"num_alibi_heads": 16, "decoder": {"decoder_dim": 768, **DECODER}},
    ),
}


def load_class(wheel: Path):
    """Emotion2vec of the unpacked wheel, without what the rest of funasr imports."""
    for name in ("funasr", "funasr.utils", "funasr.models"):
        package = types.ModuleType(name)
        package.__path__ = [str(wheel / Path(*name.split(".")))]
        sys.modules[name] = package
    loading = types.ModuleType("funasr.utils.load_utils")
    loading.load_audio_text_image_video = None  # Reads files; not needed.
    sys.modules[loading.__name__] = loading
    return importlib.import_module("funasr.models.emotion2vec.model").Emotion2vec


def conf(model: dict, audio: dict) -> dict:
    return {**MODEL, **model, "modalities": {"audio": {**AUDIO, **audio}}}


def write_yaml(path: Path, model_conf: dict) -> None:
    """config.yaml as released; there, too, 1e-05 stands without a point."""
    text = yaml.safe_dump({"model": "Emotion2vec", "model_conf": model_conf}, sort_keys=False)
    path.write_text(text.replace("1.0e-05", "1e-05"))


@torch.no_grad()
def make_case(cls, folder: Path, model: dict, audio: dict, labels: int) -> None:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    net = cls(model_conf=conf(model, audio), vocab_size=labels or -1).eval()
    for name, parameter in net.named_parameters():
        # Some scales of ALiBi below zero, where the reference cuts them off.
        spread = 1.0 if name.endswith("alibi_scale") else 0.1
        parameter.add_(spread * torch.randn_like(parameter))
    write_yaml(folder / "config.yaml", conf(model, audio))
    if labels:
        (folder / "tokens.txt").write_text("".join(f"label_{i}\n" for i in range(labels)))
    prefix = "" if labels == 4 else "d2v_model."
    state = {
        (key if key.startswith("proj.") else prefix + key): value.contiguous()
        for key, value in net.state_dict().items()
    }
    save_file(state, folder / "model.safetensors")
    arrays = {}
    for index, length in enumerate(LENS):
        wave = torch.randn(length)
        # As Emotion2vec.inference.
        source = torch.nn.functional.layer_norm(wave, wave.shape)[None]
        x = net.extract_features(source, padding_mask=None)["x"]
        arrays |= {f"{index}/wave": wave, f"{index}/x": x[0], f"{index}/feats": x[0].mean(0)}
        if labels:
            arrays[f"{index}/logits"] = net.proj(x.mean(dim=1))[0]
    np.savez(folder / "io.npz", **{key: value.numpy() for key, value in arrays.items()})


def make_released(cls, name: str, model: dict, audio: dict) -> None:
    """Names and shapes of a released checkpoint's tensors, from the class at its real size."""
    with torch.device("meta"):
        net = cls(model_conf=conf(model, {**RELEASED_AUDIO, **audio}), vocab_size=9)
    shapes = {
        (key if key.startswith("proj.") else f"d2v_model.{key}"): list(value.shape)
        for key, value in net.state_dict().items()
    }
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    write_yaml(folder / "config.yaml", conf(model, {**RELEASED_AUDIO, **audio}))
    (folder / "shapes.json").write_text(json.dumps(shapes))


def main() -> None:
    cls = load_class(Path(sys.argv[1]))
    for name, case in CASES.items():
        make_case(cls, HERE / name, *case)
    for name, case in RELEASED.items():
        make_released(cls, name, *case)


if __name__ == "__main__":
    main()
