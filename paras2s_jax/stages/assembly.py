"""The policy of a config and what surrounds it: small packaged parts, or a released Kimi-Audio."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from paras2s_jax.align.policy import Frontend, SpeechPolicy
from paras2s_jax.convert import trained
from paras2s_jax.convert.kimi_audio import ARCHITECTURES
from paras2s_jax.convert.pretrained import load_variables
from paras2s_jax.data.tokenizer import TextTokenizer, Tokenizer
from paras2s_jax.judge import transcribe
from paras2s_jax.models.codec import KMeansCodec
from paras2s_jax.models.kimi_audio import KimiAudio, KimiAudioConfig
from paras2s_jax.models.lora import LoRA
from paras2s_jax.models.placement import unbox
from paras2s_jax.models.sampling import Sampling
from paras2s_jax.models.whisper import WhisperEncoder
from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.stages import kimi
from paras2s_jax.stages.registry import StageError
from paras2s_jax.stages.speech import CODEC_FILE, TEXT_FILE, parts_dir
from paras2s_jax.train import distributed
from paras2s_jax.train.checkpoint import load_part
from paras2s_jax.train.sharding import Layouts, make_layouts
from paras2s_jax.train.state import split_trainable

# Folder of a stage's policy, inside the stage's own.
POLICY = "policy"


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A policy with all that surrounds it.

    Attributes:
        policy, frontend: see align.policy; an outline's front end holds no arrays.
        tokenizer: of the text stream; None in an outline.
        layouts: where everything lies.
        base: folder of the checkpoint that training starts from; None for the packaged parts.
        trainable: regex of the variables that training changes.
    """

    policy: SpeechPolicy
    frontend: Frontend
    tokenizer: Tokenizer | None
    layouts: Layouts
    base: Path | None
    trainable: str

    @property
    def trains_params(self) -> bool:
        """Whether training changes more than adapters."""
        return "params" in split_trainable(unbox(self.policy.boxed()), self.trainable)[0]

    def load(self, folder: Path, seed: int = 0) -> dict[str, Any]:
        """The policy's variables from a checkpoint's folder, where training wants them.

        seed: of adapters that the folder does not have.

        Raises:
            ConversionError: it does not fit the config.
            FileNotFoundError: there is none.
        """
        layout = self.layouts.train
        rules = None if layout.mesh is None else layout.rules
        rng = jax.random.key(seed)
        return load_variables(folder, self.policy.model, mesh=layout.mesh, rules=rules, rng=rng)

    def frozen(self, variables: Any) -> Any:
        """Variables that are not trained, their matrices in the type that they multiply in.

        Norms and biases stay as they are, so that the policy computes the same to the bit. What is
        in that type already is shared, not copied. ShapeDtypeStructs are answered in kind.
        """
        dtype = self.policy.model.dtype

        def cast(path, x):
            is_matrix = path[-1].key in ("kernel", "embedding")
            if not is_matrix or x.dtype == dtype:
                return x
            if isinstance(x, jax.ShapeDtypeStruct):
                return x.update(dtype=dtype)
            return jax.jit(lambda x: x.astype(dtype), out_shardings=x.sharding)(x)

        return jax.tree_util.tree_map_with_path(cast, variables)

    def save(self, folder: Path, variables: dict[str, Any]) -> None:
        """Saves trained variables as a checkpoint that `load`, respond and export read."""
        model, keeps_params = self.policy.model, self.base is not None and not self.trains_params
        config = {"architectures": list(ARCHITECTURES), **dataclasses.asdict(model.config)}
        distributed.on_main(
            f"{folder} is laid out",
            lambda: trained.lay_out(
                folder, base=self.base, config=config, keeps_params=keeps_params
            ),
        )
        meta = {"lora": {"alpha": model.lora.alpha}} if "lora" in variables else {}
        trained.save(folder, variables, meta, keeps_params=keeps_params)


def assemble(config: ConfigDict, workdir: Path, layouts: Layouts | None = None) -> Assembly:
    """Builds the policy of the config; its variables are loaded apart.

    layouts: by default those of `layouts_of`.

    Raises:
        StageError: the checkpoint lacks a part, or is not what policy.model says.
    """
    layouts = layouts_of(config) if layouts is None else layouts
    if config.policy.checkpoint:
        return _released(config, layouts)
    return _packaged(config, workdir, layouts)


def outline(config: ConfigDict, layouts: Layouts) -> Assembly:
    """As `assemble`, for plans: a front end without arrays, and no checkpoint needs to be there.

    Where there is none, sizes are those of the release but for what policy.model says.
    """
    if not config.policy.checkpoint:
        made = _packaged(config, Path(), layouts)
        frontend = jax.eval_shape(lambda: made.frontend)
        return dataclasses.replace(made, frontend=frontend)
    folder = Path(config.policy.checkpoint)
    if folder.is_dir():
        sizes = _agreeing(kimi.Sizes.of(folder), config)
    else:
        model = dataclasses.replace(kimi.RELEASED.model, **config.policy.model)
        sizes = dataclasses.replace(kimi.RELEASED, model=model)
    around = _surroundings(config, sizes)
    policy = _policy(config, sizes.model, around.encoder)
    return Assembly(policy, around.outline(), None, layouts, folder, config.policy.trainable)


def layouts_of(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Layouts:
    """Where training and decoding put their arrays; one device needs no mesh.

    devices: by default all.
    """
    mesh, decode_mesh = config.mesh.to_dict(), config.decode_mesh.to_dict()
    if devices is None and all(size == 1 for size in (*mesh.values(), *decode_mesh.values())):
        return Layouts()
    return make_layouts(mesh, config.rules, decode_mesh, config.decode_rules, devices)


def own_layouts(config: ConfigDict) -> Layouts:
    """Of a stage that one process runs while others wait: over its own devices alone."""
    if jax.process_count() == 1:
        return layouts_of(config)
    devices = jax.local_devices()
    return make_layouts({"tensor": len(devices)}, config.decode_rules, devices=devices)


def policy_folder(config: ConfigDict, workdir: Path, stage: str) -> Path:
    """The checkpoint folder of the policy that a stage left, or that training starts from."""
    if stage == "base" and config.policy.checkpoint:
        return Path(config.policy.checkpoint)
    return workdir / stage / POLICY


def folder_digest(folder: Path) -> str:
    """Changes with any file of a checkpoint, without reading one."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        status = path.stat()
        line = f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n"
        digest.update(line.encode())
    return digest.hexdigest()[:16]


def _packaged(config: ConfigDict, workdir: Path, layouts: Layouts) -> Assembly:
    folder, c = parts_dir(config, workdir), config.policy
    variables, meta = load_part(folder / transcribe.MODEL_FILE, "float32")
    encoder = WhisperEncoder(WhisperConfig(**meta["config"]), scan_unroll=c.scan_unroll)
    codec = KMeansCodec.load(
        folder / CODEC_FILE,
        num_iters=c.detokenizer.griffin_lim_iters,
        rows_at_once=c.detokenizer.griffin_lim_rows,
    )
    frontend = Frontend({"params": variables["params"]["encoder"]}, codec, codec)
    policy = _policy(config, KimiAudioConfig(**c.model), encoder)
    tokenizer = TextTokenizer.load(folder / TEXT_FILE)
    return Assembly(policy, frontend, tokenizer, layouts, None, c.trainable)


def _released(config: ConfigDict, layouts: Layouts) -> Assembly:
    folder, layout = Path(config.policy.checkpoint), layouts.train
    sizes, tokenizer = kimi.parts_of(folder)
    around = _surroundings(config, _agreeing(sizes, config))
    rules = None if layout.mesh is None else layout.rules
    frontend = around.load(folder, layout.mesh, rules)
    policy = _policy(config, sizes.model, around.encoder)
    return Assembly(policy, frontend, tokenizer, layouts, folder, config.policy.trainable)


def _surroundings(config: ConfigDict, sizes: kimi.Sizes) -> kimi.Surroundings:
    c = config.policy
    return kimi.Surroundings(sizes, jnp.dtype(c.dtype), c.detokenizer.to_dict())


def _agreeing(sizes: kimi.Sizes, config: ConfigDict) -> kimi.Sizes:
    """The sizes, which are those that the config speaks of."""
    for name, told in config.policy.model.items():
        found = getattr(sizes.model, name)
        if found != told:
            raise StageError(
                f"config.policy.model.{name} is {told}, that of {config.policy.checkpoint} "
                f"{found}: correct the config, or give another policy.checkpoint."
            )
    return sizes


def _policy(config: ConfigDict, model: KimiAudioConfig, encoder: WhisperEncoder) -> SpeechPolicy:
    c = config.policy
    return SpeechPolicy(
        model=KimiAudio(
            model,
            LoRA(c.lora.rank, c.lora.alpha, tuple(c.lora.targets)),
            jnp.dtype(c.dtype),
            jnp.dtype(c.param_dtype),
            scan_unroll=c.scan_unroll,
            remat=c.remat,
        ),
        encoder=encoder,
        max_steps=c.max_steps,
        text=Sampling(**c.text_sampling),
        audio=Sampling(**c.audio_sampling),
        pieces_of_30_s=bool(c.checkpoint),
        logp_chunk=c.logp_chunk,
        halvings=c.halvings,
        rollout_options=tuple(tuple(pair) for pair in c.rollout_options),
    )
