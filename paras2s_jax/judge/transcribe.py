"""Waves → words: a Whisper recogniser behind the judge, and the recipe that trains a small one."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paras2s_jax.audio.mel import whisper_log_mel
from paras2s_jax.data.batches import Batches
from paras2s_jax.data.records import SpeechClip
from paras2s_jax.data.tokenizer import TextTokenizer, normalize
from paras2s_jax.judge.buckets import Buckets
from paras2s_jax.judge.interfaces import Transcript
from paras2s_jax.judge.ledger import digest, params_digest
from paras2s_jax.judge.recipe import (
    Augment,
    Recipe,
    augment_rows,
    init_variables,
    recipe_optimizer,
)
from paras2s_jax.models.whisper import WhisperASR
from paras2s_jax.models.whisper_decode import transcribe_greedy
from paras2s_jax.models.whisper_layers import WhisperConfig
from paras2s_jax.train.checkpoint import Checkpointer, CheckpointError, load_part, save_part
from paras2s_jax.train.loop import fit
from paras2s_jax.train.metrics import MetricWriter
from paras2s_jax.train.state import TrainState
from paras2s_jax.train.step import Sums, make_update

# 80 ms: pieces of speech in random order keep its sounds and lose its words, and sound like what a
# codec of 12.5 Hz makes of random codes.
PIECE_SAMPLES = 1280

MODEL_FILE, TOKENIZER_FILE = "asr.safetensors", "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How words are read off a recogniser; ids are those of its vocabulary.

    prompt: starts every row. suppress, suppress_first: ids never chosen, or never chosen first.
    max_tokens: at most, the end included.
    min_mean_logp: a transcript less likely than this per token is no speech.
    min_rms: a wave quieter than this (full scale = 1) is no speech.
    pad_to_bucket: let the encoder hear the padding as silence, as the released Whisper does,
        which was trained on 30 s (so give it one bucket of 30 s).
    """

    prompt: tuple[int, ...]
    eos_id: int
    max_tokens: int = 48
    suppress: tuple[int, ...] = ()
    suppress_first: tuple[int, ...] = ()
    min_mean_logp: float = -1.0
    min_rms: float = 1e-3
    pad_to_bucket: bool = False


class WhisperTranscriber:
    """Transcribes waves, batched, in fixed shapes."""

    def __init__(
        self,
        config: WhisperConfig,
        variables: Mapping[str, Any],
        tokenizer: TextTokenizer,
        decoding: Decoding,
        *,
        len_buckets_s: Sequence[float],
        batch_size: int = 16,
    ):
        self.config, self.variables = config, variables
        self.tokenizer, self.decoding = tokenizer, decoding
        self._buckets = Buckets(len_buckets_s, batch_size)
        self._len_buckets_s = tuple(len_buckets_s)
        self._model = WhisperASR(config)
        self.model_id = f"whisper-asr-{params_digest(variables)[:12]}"
        # What each id says, whatever the file of the tokenizer looks like.
        words = digest([tokenizer.decode([i]) for i in range(tokenizer.vocab_size)])
        self.settings = {**dataclasses.asdict(decoding), "tokenizer": words}

    @property
    def max_dur_s(self) -> float:
        return self._buckets.max_dur_s

    def transcribe(self, waves: Sequence[np.ndarray]) -> list[Transcript]:
        """waves: float32[L] each. Returns: their words, "" where no speech is heard."""
        run = functools.partial(
            _transcribe, self._model, self.decoding, {"params": self.variables["params"]}
        )
        return [
            self._transcript(row, wave)
            for row, wave in zip(self._buckets.run(run, waves), waves, strict=True)
        ]

    def _transcript(self, row: Any, wave: np.ndarray) -> Transcript:
        mean_logp = float(row.mean_logp)
        if not np.isfinite(mean_logp):
            raise CheckpointError(
                f"{self.model_id} gives values that are not finite; train it again."
            )
        rms = float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))) if len(wave) else 0.0
        has_speech = rms >= self.decoding.min_rms and mean_logp >= self.decoding.min_mean_logp
        text = self.tokenizer.decode(row.tokens[: int(row.lens)]).strip() if has_speech else ""
        # Rounded so that the ledger stays readable.
        return Transcript(text, round(mean_logp, 4))

    def save(self, folder: str | Path) -> None:
        """Writes the model and its tokenizer."""
        meta = {
            "kind": "transcriber",
            "config": dataclasses.asdict(self.config),
            "decoding": dataclasses.asdict(self.decoding),
            "len_buckets_s": self._len_buckets_s,
        }
        self.tokenizer.save(Path(folder) / TOKENIZER_FILE)
        save_part(Path(folder) / MODEL_FILE, self.variables, meta)

    @classmethod
    def load(cls, folder: str | Path, *, batch_size: int = 16) -> "WhisperTranscriber":
        """Reads what `save` wrote."""
        path = Path(folder) / MODEL_FILE
        variables, meta = load_part(path, "float32")
        if meta.get("kind") != "transcriber":
            raise CheckpointError(f"{path}: holds no transcriber; train one to this folder.")
        decoding = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in meta["decoding"].items()
        }
        return cls(
            WhisperConfig(**meta["config"]),
            variables,
            TextTokenizer.load(Path(folder) / TOKENIZER_FILE),
            Decoding(**decoding),
            len_buckets_s=meta["len_buckets_s"],
            batch_size=batch_size,
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _transcribe(
    model: WhisperASR, decoding: Decoding, variables: Mapping, waves: jax.Array, lens: jax.Array
):
    """Returns: models.whisper.Transcript."""
    num_mels = model.config.num_mel_bins
    if decoding.pad_to_bucket:
        real = jnp.arange(waves.shape[1]) < lens[:, None]
        mel, mask = whisper_log_mel(jnp.where(real, waves, 0.0), None, num_mels)[0], None
    else:
        mel, mask = masked_mel(waves, lens, num_mels)
    return transcribe_greedy(
        model,
        variables,
        mel,
        mask,
        prompt=decoding.prompt,
        eos_id=decoding.eos_id,
        max_tokens=decoding.max_tokens,
        suppress=decoding.suppress,
        suppress_first=decoding.suppress_first,
    )


def train(
    config: WhisperConfig,
    clips: Sequence[SpeechClip],
    root: str | Path,
    recipe: Recipe,
    *,
    vocab_size: int = 300,
    ctc_weight: float = 0.5,
    voiceprint_weight: float = 3.0,
    no_speech_share: float = 0.125,
    min_mean_logp: float = -0.5,
    augment: Augment | None = None,
    checkpointer: Checkpointer | None = None,
    writer: MetricWriter | None = None,
) -> WhisperTranscriber:
    """Trains a small recogniser from scratch, with its own tokenizer over the clips' words.

    Teacher-forced cross-entropy, and beside it a CTC loss on the encoder, which holds the
    alignment to the order of time (Kim et al. 2017, arXiv 1609.06773, eq. 4 in sum form). Some
    rows of each batch become noise, or speech in shuffled pieces, with an empty transcript: a
    recogniser that has heard only speech finds words in anything. For the same reason, let many
    of the clips speak words in random order (`salad`): one that knows only a few sentences
    hears one of them in every garble.

    A third loss makes the mean of the encoder's output tell the clip's mean spectrum and its
    spread over time. Large recognisers, trained on everybody's speech, keep the voice in what they
    encode; a small one, asked for nothing but words, would lose what the style analyzers and the
    policy are to hear. It needs no labels of style or speaker.

    Args:
        config: of the model; its vocab_size is set to that of the tokenizer, plus start and end.
        clips: transcribed speech; wavs relative to root.
        min_mean_logp: of the transcriber's `Decoding`.
        augment: resynthesises waves; applied to `recipe.augment_share` of each batch.
    """
    texts = [normalize(clip.text) for clip in clips]
    tokenizer = TextTokenizer.train(texts, vocab_size)
    sot_id, eos_id = tokenizer.vocab_size, tokenizer.vocab_size + 1
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size + 2)
    rows = [{"wav": clip.wav, "ids": tokenizer.encode(text)} for clip, text in zip(clips, texts)]
    max_ids = max(len(row["ids"]) for row in rows)
    batches = Batches(
        rows,
        root=root,
        audio_keys=("wav",),
        token_keys=("ids",),
        batch_size=recipe.batch_size,
        len_buckets_s=recipe.len_buckets_s,
        token_buckets=(max_ids,),
        seed=recipe.seed,
        shuffle=True,
        repeat=True,
    )
    model = WhisperASR(config)
    variables = init_variables(
        model, config, recipe.seed, decoder_input_ids=jnp.zeros((1, 4), jnp.int32)
    )
    # The encoder's own guess at the tokens; sot_id is CTC's blank.
    variables["ctc"] = {"kernel": jnp.zeros((config.d_model, tokenizer.vocab_size + 1))}
    variables["voiceprint"] = init_voiceprint(config)
    weights = ctc_weight, voiceprint_weight
    optimizer = recipe_optimizer(recipe)

    def loss_fn(variables, batch, rng):
        rngs = jax.random.split(rng)
        waves, lens, id_lens = without_words(
            batch["wav"], batch["wav_len"], batch["ids_len"], no_speech_share, rngs[0]
        )
        # From the other end, so that wordless rows are resynthesised only where rows run out.
        waves, lens = augment_rows(waves[::-1], lens[::-1], augment, recipe, rngs[1])
        batch = {"waves": waves[::-1], "lens": lens[::-1], "ids": batch["ids"], "id_lens": id_lens}
        return _loss(model, variables, batch, sot_id, eos_id, weights)

    state = fit(
        TrainState.create(variables, optimizer, jax.random.key(recipe.seed)),
        make_update(loss_fn, optimizer),
        batches,
        num_steps=recipe.num_steps,
        checkpointer=checkpointer,
        save_every=recipe.save_every,
        writer=writer,
        log_every=recipe.log_every,
        progress_label="transcriber",
    )
    return WhisperTranscriber(
        config,
        {"params": state.variables["params"]},
        tokenizer,
        Decoding(
            prompt=(sot_id,),
            eos_id=eos_id,
            max_tokens=min(max_ids + 8, config.max_target_positions - 1),
            suppress=(sot_id,),
            min_mean_logp=min_mean_logp,
        ),
        len_buckets_s=recipe.len_buckets_s,
    )


def without_words(
    waves: jax.Array, lens: jax.Array, id_lens: jax.Array, share: float, rng: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Turns the first `share` of the rows into their own pieces in random order, or into noise.

    waves: float32[B, L]; lens: int32[B], samples; id_lens: int32[B].
    Returns: the same, with id_lens 0 for those rows.
    """
    count, length = round(share * waves.shape[0]), waves.shape[1]
    if not count:
        return waves, lens, id_lens
    kind_rng, level_rng, noise_rng, shuffle_rng = jax.random.split(rng, 4)
    level = 10 ** jax.random.uniform(level_rng, (count, 1), minval=-3.0, maxval=-0.7)
    noise = level * jax.random.normal(noise_rng, (count, length))
    num_pieces = length // PIECE_SAMPLES
    pieces = waves[:count, : num_pieces * PIECE_SAMPLES].reshape(count, num_pieces, PIECE_SAMPLES)
    shuffled = jax.vmap(jax.random.permutation)(jax.random.split(shuffle_rng, count), pieces)
    shuffled = shuffled.reshape(count, -1)
    shuffled = jnp.pad(shuffled, ((0, 0), (0, length - shuffled.shape[1])))
    # Noise is easily told from speech, pieces are not.
    is_noise = jax.random.bernoulli(kind_rng, 0.25, (count, 1))
    wordless = jnp.where(is_noise, noise, shuffled)
    return (
        jnp.concatenate([wordless, waves[count:]]),
        lens,
        id_lens.at[:count].set(0),
    )


def masked_mel(waves: jax.Array, lens: jax.Array, num_mels: int) -> tuple[jax.Array, jax.Array]:
    """Returns: (mel float32[B, A, M], mask bool[B, A])."""
    mel, len_frames = whisper_log_mel(waves, lens, num_mels)
    return mel, jnp.arange(mel.shape[1]) < len_frames[:, None]


def _loss(
    model: WhisperASR,
    variables: Mapping,
    batch: Mapping[str, jax.Array],
    sot_id: int,
    eos_id: int,
    aux_weights: tuple[float, float],
) -> Sums:
    """Cross-entropy of [ids, end] after [start, ids], per token, plus weighted auxiliary losses.

    aux_weights: of the CTC loss and of the voiceprint's squared error.
    """
    ids, id_lens = batch["ids"], batch["id_lens"]
    mel, mask = masked_mel(batch["waves"], batch["lens"], model.config.num_mel_bins)
    inputs = jnp.pad(ids, ((0, 0), (1, 0)), constant_values=sot_id)
    at = jnp.arange(inputs.shape[1])
    targets = jnp.where(at < id_lens[:, None], jnp.pad(ids, ((0, 0), (0, 1))), eos_id)
    real = (at <= id_lens[:, None]).astype(jnp.float32)
    logits, out = model.apply({"params": variables["params"]}, mel, inputs, mask, method="predict")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    hits = (jnp.argmax(logits, axis=-1) == targets) * real
    ctc_logits = out["encoded"] @ variables["ctc"]["kernel"]
    ctc = optax.ctc_loss(
        ctc_logits,
        1.0 - mask[:, ::2],
        ids,
        (jnp.arange(ids.shape[1]) >= id_lens[:, None]).astype(jnp.float32),
        blank_id=sot_id,
    )
    weight = real.sum()
    print_loss = _voiceprint_error(variables["voiceprint"], mel, mask, out["encoded"])
    ctc_weight, voiceprint_weight = aux_weights
    total = jnp.sum(losses * real) + ctc_weight * ctc.sum() + voiceprint_weight * print_loss.sum()
    metrics = {
        "token_loss": (jnp.sum(losses * real), weight),
        "token_accuracy": (hits.sum(), weight),
        "ctc_loss": (ctc.sum(), weight),
        "voiceprint_error": (print_loss.sum(), jnp.float32(len(print_loss))),
    }
    return Sums(total, weight, metrics)


def init_voiceprint(config: WhisperConfig) -> dict[str, jax.Array]:
    """A linear map from the encoder's mean output to mean and spread of the mel spectrum."""
    outputs = 2 * config.num_mel_bins
    return {"kernel": jnp.zeros((config.d_model, outputs)), "bias": jnp.zeros(outputs)}


def _voiceprint_error(head, mel: jax.Array, mask: jax.Array, encoded: jax.Array) -> jax.Array:
    """Squared error of the guess, summed over mel bands: float32[B].

    mel: float32[B, A, M]; mask: bool[B, A]; encoded: float32[B, A // 2, D].
    """

    def mean(x, mask):
        weights = mask[..., None] / jnp.maximum(mask.sum(axis=1), 1)[:, None, None]
        return jnp.sum(x * weights, axis=1)

    centre = mean(mel, mask)
    spread = jnp.sqrt(mean(jnp.square(mel - centre[:, None]), mask) + 1e-6)
    wanted = jnp.concatenate([centre, spread], axis=-1)
    guess = mean(encoded, mask[:, ::2]) @ head["kernel"] + head["bias"]
    return jnp.sum(jnp.square(guess - wanted), axis=-1)
