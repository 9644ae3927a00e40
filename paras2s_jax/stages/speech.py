"""Stages about speech: synthesize, pretrain (the small parts), analyzers, polytone."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tqdm
from ml_collections import ConfigDict

from paras2s_jax.audio import wave
from paras2s_jax.data import records, speaking, synthesize
from paras2s_jax.data.bank import load_bank
from paras2s_jax.data.records import PolytoneClip, Query, SpeechClip
from paras2s_jax.data.tokenizer import TextTokenizer
from paras2s_jax.judge import polytone, salad, tone, transcribe
from paras2s_jax.judge.recipe import Recipe, another_microphone
from paras2s_jax.models.codec import KMeansCodec, fit_codebook
from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.stages.registry import StageError, figures_of
from paras2s_jax.train.checkpoint import Checkpointer, load_part, save_part
from paras2s_jax.train.metrics import MetricWriter

PACKAGED = Path(__file__).resolve().parents[1] / "parts"
CODEC_FILE, TONE_FILE, TEXT_FILE, BASE_FILE = (
    "codec.safetensors",
    "tone.safetensors",
    "text_tokenizer.json",
    "base.safetensors",
)
QUERIES = "queries.jsonl"
PART_FILES = (CODEC_FILE, TONE_FILE, TEXT_FILE, transcribe.MODEL_FILE, transcribe.TOKENIZER_FILE)


def speech_dir(workdir: Path) -> Path:
    """Where `synthesize` writes."""
    return workdir / "synthesize"


def data_dir(config: ConfigDict, workdir: Path) -> Path:
    """Where queries, demonstrations and their wavs are: the user's folder, or what was spoken."""
    return Path(config.data.folder) if config.data.folder else speech_dir(workdir)


def queries_of(root: Path, split: str) -> list[Query]:
    """The spoken queries of a split; wavs relative to `root`.

    Raises:
        StageError: there are none.
    """
    queries = records.read_jsonl(root / QUERIES, Query)
    found = [query for query in queries if query.split == split]
    if not found:
        raise StageError(
            f'{root / QUERIES} has no query of split "{split}": mark some of its '
            f"{len(queries)} queries so."
        )
    return found


def parts_dir(config: ConfigDict, workdir: Path) -> Path:
    """Where the pretrained parts are: in the package, or in the run that trains them."""
    source = config.pretrain.source
    return workdir / "pretrain" if source == "train" else PACKAGED / source


def run_synthesize(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """The text bank -> spoken queries, answers, analyzer and recogniser clips."""
    c = config.synthesize
    return synthesize.run(
        speech_dir(workdir),
        seed=config.seed,
        num_workers=c.num_workers,
        sizes=synthesize.Sizes(**c.sizes),
        maker=maker_of(config),
    )


def maker_of(config: ConfigDict) -> speaking.Maker:
    """The configured synthesizer."""
    return speaking.maker_of(config.synthesize.synthesizer, dict(config.synthesize.options))


def recipe_of(section: ConfigDict, seed: int) -> Recipe:
    """A judge model's training recipe from its config section."""
    values = {key: tuple(v) if isinstance(v, (list, tuple)) else v for key, v in section.items()}
    return Recipe(**values, seed=seed)


def codec_copies(
    codec: KMeansCodec, clips: Sequence[SpeechClip], root: Path, out_dir: Path, batch_size: int = 32
) -> list[SpeechClip]:
    """The clips as they sound after the codec, so that the judge's models know that sound.

    Returns: the clips with `wav` relative to out_dir and ids ending in "-codec"; wavs that are
    there already are kept.
    """

    @jax.jit
    def through(codec, waves, lens):
        return codec.decode(*codec.encode(waves, lens))

    copies = [
        dataclasses.replace(clip, id=f"{clip.id}-codec", wav=f"wavs/{clip.id}.wav")
        for clip in clips
    ]
    todo = [i for i, copy in enumerate(copies) if not (out_dir / copy.wav).exists()]
    todo.sort(key=lambda i: clips[i].dur_s)
    for start in tqdm.trange(0, len(todo), batch_size, desc="codec copies", unit="batch"):
        rows = todo[start : start + batch_size]
        loaded = [wave.load(root / clips[i].wav) for i in rows]
        length = -(-max(map(len, loaded)) // 8000) * 8000
        waves = np.zeros((batch_size, length), np.float32)
        lens = np.zeros(batch_size, np.int32)
        for row, clip in enumerate(loaded):
            waves[row, : len(clip)], lens[row] = clip, len(clip)
        made, made_lens = jax.device_get(through(codec, waves, lens))
        for row, i in enumerate(rows):
            wave.save(out_dir / copies[i].wav, made[row, : made_lens[row]], wave.RATE_HZ)
    return copies


def run_pretrain(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Codec, recogniser, tone namer and text tokenizer: trained, or taken from the package.

    Raises:
        FileNotFoundError: the package lacks a part.
    """
    folder = parts_dir(config, workdir)
    if config.pretrain.source == "train":
        _train_parts(config, workdir, folder)
    missing = [name for name in PART_FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}; train the parts with "
            "--config.pretrain.source=train."
        )
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return {"parts/mb": round(size / 1e6, 2)}


def _train_parts(config: ConfigDict, workdir: Path, folder: Path) -> None:
    c, root = config.pretrain, speech_dir(workdir)
    clips = records.read_jsonl(root / "speech.jsonl", SpeechClip)
    clips = [clip for clip in clips if clip.split == "train"]
    rng = np.random.default_rng(config.seed)
    _train_text_tokenizer(folder / TEXT_FILE, c.text_vocab_size)
    # Drawn in any case, so that a resumed stage draws the same copies below.
    chosen = _sample(clips, c.codec.num_answers, c.codec.num_others, rng)
    if not (folder / CODEC_FILE).exists():
        waves = [wave.load(root / clip.wav) for clip in chosen]
        codebook = fit_codebook(waves, c.codec.num_codes, config.seed)
        KMeansCodec.from_codebook(codebook).save(folder / CODEC_FILE)
    codec = KMeansCodec.load(folder / CODEC_FILE)
    spoken = [clip for clip in clips if clip.kind in ("answer", "tone")]
    others = [clip for clip in clips if clip.kind not in ("answer", "tone")]
    picked = rng.choice(len(others), min(c.copies_of_others, len(others)), replace=False)
    copied = spoken + [others[i] for i in sorted(picked)]
    copies = codec_copies(codec, copied, root, folder / "copies")
    # One root for both: paths of the copies as seen from the speech folder's parent.
    base = workdir
    mixed = [_moved(clip, f"{root.relative_to(base)}/") for clip in clips]
    mixed += [_moved(copy, f"{folder.relative_to(base)}/copies/") for copy in copies]
    if not (folder / transcribe.MODEL_FILE).exists():
        salads = _salad_clips(config, codec, folder)
        model = transcribe.train(
            WhisperConfig(**c.asr.model),
            mixed + [_moved(clip, f"{folder.relative_to(base)}/") for clip in salads],
            base,
            recipe_of(c.asr.recipe, config.seed),
            vocab_size=c.asr.vocab_size,
            checkpointer=Checkpointer(folder / "asr_checkpoints"),
            writer=MetricWriter(folder / "asr_metrics"),
        )
        model.save(folder)
    if not (folder / TONE_FILE).exists():
        model = tone.train(
            WhisperConfig(**c.tone.model),
            mixed,
            base,
            recipe_of(c.tone.recipe, config.seed),
            checkpointer=Checkpointer(folder / "tone_checkpoints"),
            writer=MetricWriter(folder / "tone_metrics"),
        )
        model.save(folder / TONE_FILE)


def _salad_clips(config: ConfigDict, codec: KMeansCodec, folder: Path) -> list[SpeechClip]:
    """Word salad for the recogniser, and the assistant's part of it also as codec copies.

    Returns: clips with wavs relative to `folder`.
    """
    bank = load_bank()
    clips = salad.speak(
        [*bank.texts("train"), *bank.texts("test")],
        folder / "salad",
        config.pretrain.salad_clips,
        seed=config.seed,
        maker=maker_of(config),
        num_workers=config.synthesize.num_workers,
    )
    spoken = [clip for clip in clips if clip.tone is not None]
    copies = codec_copies(codec, spoken, folder / "salad", folder / "salad_copies")
    return [_moved(clip, "salad/") for clip in clips] + [
        _moved(copy, "salad_copies/") for copy in copies
    ]


def _moved(clip: SpeechClip, prefix: str) -> SpeechClip:
    return dataclasses.replace(clip, wav=prefix + clip.wav)


def _sample(clips: Sequence[SpeechClip], num_answers: int, num_others: int, rng) -> list:
    answers = [clip for clip in clips if clip.kind == "answer"]
    others = [clip for clip in clips if clip.kind != "answer"]
    chosen = []
    for part, count in ((answers, num_answers), (others, num_others)):
        picked = rng.choice(len(part), min(count, len(part)), replace=False)
        chosen += [part[i] for i in sorted(picked)]
    return chosen


def _train_text_tokenizer(path: Path, vocab_size: int) -> None:
    """Tokenizer of the policy's text stream, over everything that the bank lets anyone say."""
    if path.exists():
        return
    TextTokenizer.train(load_bank().texts(), vocab_size).save(path)


def asr_encoder(config: ConfigDict, workdir: Path) -> tuple[WhisperConfig, dict]:
    """Config and parameters of the recogniser's encoder, from which other listeners start."""
    variables, meta = load_part(parts_dir(config, workdir) / transcribe.MODEL_FILE, "float32")
    return WhisperConfig(**meta["config"]), variables["params"]["encoder"]


def run_analyzers(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """The judge's style analyzers, trained with PolyTone and tested where words mislead."""
    return _fit_analyzers(config, workdir, workdir / "analyzers", "polytone")


def run_polytone(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """The same analyzers trained where words agree with the voice, to compare with."""
    figures = figures_of(workdir / "analyzers")
    figures |= _fit_analyzers(config, workdir, workdir / "polytone", "plain")
    polytone.print_table(figures)
    return figures


def _fit_analyzers(
    config: ConfigDict, workdir: Path, folder: Path, of_set: str
) -> dict[str, float]:
    c, root = config.polytone, speech_dir(workdir)
    whisper, encoder = asr_encoder(config, workdir)
    return polytone.fit(
        dataclasses.replace(whisper, classifier_proj_size=c.classifier_proj_size),
        records.read_jsonl(root / "polytone.jsonl", PolytoneClip),
        root,
        recipe_of(c.recipe, config.seed),
        folder,
        of_set=of_set,
        init_encoder=encoder,
        augment=another_microphone,
    )


def package_parts(workdir: Path, target: Path) -> None:
    """Stores a run's parts at half precision, as the package ships them (a maintainer's step)."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (TEXT_FILE, transcribe.TOKENIZER_FILE, CODEC_FILE):
        shutil.copyfile(workdir / "pretrain" / name, target / name)
    models = [workdir / "pretrain" / name for name in (TONE_FILE, transcribe.MODEL_FILE)]
    for path in (*models, workdir / "base" / BASE_FILE):
        save_part(target / path.name, *load_part(path), "float16")
