"""Kimi-Audio's detokenizer: speech codes -> mel frames -> 24 kHz waveform, in chunks or at once.

Arithmetic of PrefixStreamingFlowMatchingDetokenizer, for batches and as pure functions: a chunk
is solved with the keys and values of earlier frames as a prefix; its last codes are held back and
solved anew with the next one (look-ahead); waveforms of neighbouring chunks are cross-faded.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from paras2s_jax.models.bigvgan import BigVGAN, fold_weight_norm
from paras2s_jax.models.detokenizer_chunks import (
    Prefix,
    StreamState,
    by_length,
    chunk_plan,
    cross_fade,
    draw_noise,
    frame_mask,
    hand_over,
    row_keys,
    window_plan,
)
from paras2s_jax.models.flow_matching import CACHE_TIME, FRAMES_PER_CODE, FlowMatchingDiT, euler
from paras2s_jax.models.placement import on_every_device

VOICE_CHUNK = 150  # Frames of a voice prompt that go through the network at one time,
MAX_VOICE_CHUNKS = 10  # so often; what is left comes first, in one piece.

# (number of the chunk, codes in it) -> float32[B, 4 * codes, M].
NoiseSource = Callable[[jax.Array, int], jax.Array]


class FlowMatchingDetokenizer(struct.PyTreeNode):
    """Codes of Kimi-Audio -> waveforms (models.codec.Detokenizer); make it with `from_models`.

    dit_params, vocoder_params: trees of the two modules, the vocoder's weight norm folded.
    first, chunk, look_ahead: codes of the first chunk, of later ones, and of those held back.
    max_kv: frames that a chunk may look back to.
    chunked: whether `decode` goes by chunks, as the release does, or solves whole answers at
      once: less work (no code is solved twice) and all frames see each other, but farther than
      the released network was made to look; at most dit.config.max_seq_len frames.
    ode_steps, ode_solver: see flow_matching.time_points.
    rows_at_once: how many answers a device takes at a time in `decode`, the longest first, so that
      short ones are done when the longest of their own batch is; None: all.
    """

    dit_params: Any
    vocoder_params: Any
    dit: FlowMatchingDiT = struct.field(pytree_node=False)
    vocoder: BigVGAN = struct.field(pytree_node=False)
    first: int = struct.field(pytree_node=False, default=30)
    chunk: int = struct.field(pytree_node=False, default=30)
    look_ahead: int = struct.field(pytree_node=False, default=12)
    max_kv: int = struct.field(pytree_node=False, default=900)
    chunked: bool = struct.field(pytree_node=False, default=True)
    ode_steps: int = struct.field(pytree_node=False, default=30)
    ode_solver: str = struct.field(pytree_node=False, default="neural_ode_euler")
    rows_at_once: int | None = struct.field(pytree_node=False, default=None)

    @classmethod
    def from_models(
        cls, dit: FlowMatchingDiT, dit_params, vocoder: BigVGAN, vocoder_params, **settings
    ) -> "FlowMatchingDetokenizer":
        """Folds the vocoder's weight norm if need be; settings: the class's other fields.

        Raises ValueError on models or settings that do not fit together.
        """
        if not vocoder.folded:
            vocoder_params = fold_weight_norm(vocoder_params)
            vocoder = vocoder.clone(folded=True)
        made = cls(dit_params, vocoder_params, dit=dit, vocoder=vocoder, **settings)
        if dit.config.input_size != vocoder.config.num_mels:
            raise ValueError(
                f"the flow-matching network makes {dit.config.input_size} mels, "
                f"the vocoder reads {vocoder.config.num_mels}"
            )
        kept = made.first - made.look_ahead
        if kept < 1 or made.chunk < 1 or made.look_ahead < 0 or kept > 2 * made.chunk:
            raise ValueError(
                f"chunks of {made.first} and then {made.chunk} codes do not go with a look-ahead "
                f"of {made.look_ahead}: need look_ahead < first <= look_ahead + 2 * chunk"
            )
        return made

    @property
    def rate_hz(self) -> int:
        return self.vocoder.config.sampling_rate

    @property
    def codebook_size(self) -> int:
        return self.dit.config.semantic_vocab_size

    @property
    def samples_per_code(self) -> int:
        return FRAMES_PER_CODE * self.vocoder.config.hop_size

    def boxed(self) -> "FlowMatchingDetokenizer":
        """Shapes, types and logical axes instead of variables; makes no arrays."""

        def variables(module, *shapes):
            inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
            return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]

        frame = ((1, 1, self.dit.config.input_size), jnp.float32)
        code, time = ((1, 1), jnp.int32), ((1,), jnp.int32)
        mel = ((1, self.vocoder.config.num_mels, 1), jnp.float32)
        return self.replace(
            dit_params=variables(self.dit, frame, code, time),
            vocoder_params=variables(self.vocoder, mel),
        )

    def decode(
        self, codes: jax.Array, len_codes: jax.Array, rng: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Waveforms of whole answers, each independent of its padding and of the other rows.

        Args:
          codes: int32[B, S]; ids outside the codebook count as the unconditional one.
          len_codes: int32[B].
          rng: of the noise: one key, from which row b takes fold_in(rng, b), or keys [B];
            key 0 if None. A row's noise does not depend on S.

        Returns:
          waves: float32[B, S * samples_per_code], 0 past lens. Cross-faded stretches are 8 %
            louder, as in the release, and may exceed 1.
          lens: int32[B], len_codes * samples_per_code.
        """
        num_mels = self.dit.config.input_size

        def of_device(self, rows):
            def some(rows):
                codes, len_codes, keys = rows
                return self.render(
                    codes, len_codes, lambda number, size: draw_noise(keys, number, size, num_mels)
                )[1:]

            return by_length(some, rows[1], rows, self.rows_at_once)

        keys = row_keys(rng, codes.shape[0])
        return on_every_device(of_device, self, (codes, len_codes, keys))

    def render(self, codes: jax.Array, len_codes: jax.Array, noise: NoiseSource):
        """As `decode`, with given noise. Returns: (mel float32[B, 4 * S, M], waves, lens)."""
        steps = codes.shape[1]
        lens = (len_codes * self.samples_per_code).astype(jnp.int32)
        if self.chunked and steps > self.first:
            mel = self._mel_by_chunks(codes, len_codes, noise)
            return mel, self._waves_by_chunks(mel, len_codes), lens
        limit = self.dit.config.max_seq_len
        if FRAMES_PER_CODE * steps > limit:
            raise ValueError(f"{steps} codes exceed {limit} frames: decode them in chunks")
        mask = frame_mask(len_codes, steps)
        x = self._solve(None, codes, noise(jnp.int32(0), steps), mask)[0]
        mel = self._mel(x, mask)
        return mel, self._vocode(mel, len_codes * FRAMES_PER_CODE), lens

    # Solving.

    def _velocity(self, prefix: Prefix | None, codes, mask=None, emit=()):
        """Velocity of frames after `prefix` as a function of (x, t)."""
        codebook = self.codebook_size
        known = (codes >= 0) & (codes < codebook)
        codes = jnp.where(known, codes, codebook)

        def velocity(x, t):
            past = {}
            positions = jnp.arange(x.shape[1])[None]
            if prefix is not None:
                past = {"cache": prefix.cache, "cache_mask": prefix.mask}
                positions = positions + prefix.position
            variables = {"params": self.dit_params}
            return self.dit.apply(variables, x, codes, t, positions, mask, **past, emit=emit)

        return velocity

    def _solve(self, prefix: Prefix | None, codes, noise, mask=None, num_ahead=None, size=None):
        """Solves 4 * S frames of codes: int32[B, S] (held ones first), all at once.

        num_ahead: codes at the end whose frames do not enter the prefix; None leaves it alone.
        size: slots of the new prefix, None: as many as before.
        Returns: (normalised mel float32[B, 4 * S, M], prefix).
        """
        settings = (self.ode_steps, self.ode_solver)
        if num_ahead is None:
            return euler(self._velocity(prefix, codes, mask), noise, *settings)[0], prefix
        if num_ahead == 0:
            velocity = self._velocity(prefix, codes, mask, emit=("kv",))
            x, out = euler(velocity, noise, *settings, keep_last=True)
            return x, prefix.append(out["kv"], size)
        x, _ = euler(self._velocity(prefix, codes, mask), noise, *settings)
        codes = codes[:, :-num_ahead]
        kept = FRAMES_PER_CODE * codes.shape[1]
        mask = None if mask is None else mask[:, :kept]
        return x, self._remember(prefix, codes, x[:, :kept], mask, size)

    def _remember(self, prefix: Prefix, codes, x, mask=None, size=None) -> Prefix:
        """One pass over solved frames x: float32[B, T, M], for their keys and values."""
        velocity = self._velocity(prefix, codes, mask, emit=("kv",))
        return prefix.append(velocity(x, jnp.full(1, CACHE_TIME))[1]["kv"], size)

    def _mel(self, x, mask=None):
        c = self.dit.config
        mel = c.denormalize(x) if c.normalize_mel else x
        return mel if mask is None else jnp.where(mask[..., None], mel, 0.0)

    def _vocode(self, mel, lens=None):
        variables = {"params": self.vocoder_params}
        return self.vocoder.apply(variables, mel, lens, method="wave")[0]

    # Streams.

    def start(self, rows: int) -> StreamState:
        """The state before the first chunk of `rows` streams."""
        c = self.dit.config
        return StreamState(
            prefix=self._empty_prefix(rows, self.max_kv),
            held=jnp.zeros((rows, 0), jnp.int32),
            pre_mel=jnp.zeros((rows, 0, c.input_size)),
            pre_wav=jnp.zeros((rows, 0)),
        )

    def _empty_prefix(self, rows: int, size: int) -> Prefix:
        c = self.dit.config
        empty = jnp.zeros((c.depth, rows, size, c.num_heads, c.width_per_head), self.dit.dtype)
        return Prefix(empty, empty, jnp.int32(0), jnp.int32(0))

    def start_with_voice(
        self, mel: jax.Array, tokens: jax.Array, chunk_frames: int = VOICE_CHUNK
    ) -> StreamState:
        """The state after a voice prompt that the streams continue.

        mel: float32[B, T, M] (bigvgan.log_mel); tokens: int32[B, T], its codes at 50 Hz.
        """
        c = self.dit.config
        steps = mel.shape[1]
        count = min(steps // chunk_frames, MAX_VOICE_CHUNKS)
        ends = [steps - i * chunk_frames for i in range(count, -1, -1)]
        x = c.normalize(mel) if c.normalize_mel else mel
        state = self.start(mel.shape[0])
        prefix = state.prefix
        for begin, end in zip([0, *ends[:-1]], ends, strict=True):
            if end > begin:
                prefix = self._remember(prefix, tokens[:, begin:end], x[:, begin:end])
        return state.replace(prefix=prefix, voice=prefix)

    def stream_chunk(
        self,
        state: StreamState,
        codes: jax.Array,
        noise: jax.Array,
        is_final: bool = False,
        len_codes: jax.Array | None = None,
    ) -> tuple[StreamState, jax.Array, jax.Array]:
        """Next piece of every stream; to be jitted, with is_final static.

        Args:
          state: of `start`, `start_with_voice` or the last call.
          codes: int32[B, S], new ones.
          noise: float32[B, 4 * (held + S), M], standard normal; held codes are solved anew.
          is_final: whether the streams end here.
          len_codes: int32[B], in a final chunk, how many codes are real; all if None. So one
            compiled shape serves every last chunk.

        Returns:
          state: a fresh one, without voice prompt, after the final chunk.
          mel: float32[B, n, M] of the frames that were settled, 0 past the real ones.
          wave: float32[B, L], which lags behind the mel until the final chunk.
        """
        num_held = state.held.shape[1]
        codes = jnp.concatenate([state.held, codes], axis=1)
        if is_final:
            mask = lens = None
            if len_codes is not None:
                mask = frame_mask(num_held + len_codes, codes.shape[1])
                lens = state.pre_mel.shape[1] + FRAMES_PER_CODE * (num_held + len_codes)
            mel = self._mel(self._solve(state.prefix, codes, noise, mask)[0], mask)
            wave = self._vocode(jnp.concatenate([state.pre_mel, mel], axis=1), lens)
            return self.start(codes.shape[0]), mel, wave
        if codes.shape[1] <= self.look_ahead or len_codes is not None:
            raise ValueError(
                f"a chunk that is not final needs more than {self.look_ahead} codes, all real"
            )
        kept = codes.shape[1] - self.look_ahead
        x, prefix = self._solve(state.prefix, codes, noise, num_ahead=self.look_ahead)
        mel = self._mel(x[:, : FRAMES_PER_CODE * kept])
        wave = self._vocode(jnp.concatenate([state.pre_mel, mel], axis=1))
        begins, limit = state.pre_wav.shape[1] == 0, self.dit.config.max_seq_len
        given, left = hand_over(state.pre_wav.shape[1], wave.shape[1])
        out = wave[:, :given]
        num_left = left // self.vocoder.config.hop_size
        return (
            state.replace(
                prefix=prefix.restart(mel.shape[1], limit, state.voice),
                held=codes[:, kept:],
                pre_mel=mel[:, -num_left:],
                pre_wav=wave[:, given:],
            ),
            mel,
            out if begins else cross_fade(state.pre_wav, out),
        )

    # Whole answers in chunks: rows may end in different ones.

    def _mel_by_chunks(self, codes, len_codes, noise: NoiseSource) -> jax.Array:
        """codes: int32[B, S], S > first. Returns: float32[B, 4 * S, M], 0 past len_codes.

        Stops when all rows have ended. Each chunk's prefix is about as long as what there is.
        """
        rows, steps = codes.shape
        count = -(-(steps - self.first) // self.chunk)  # After the first.
        width = self.look_ahead + self.chunk
        whole = self.first + count * self.chunk
        codes = jnp.pad(codes, ((0, 0), (0, whole - steps)))
        mel = jnp.zeros((rows, FRAMES_PER_CODE * whole, self.dit.config.input_size))
        last = jnp.max(self._last_chunk(len_codes))

        def step(carry, number, begin, codes, mask, size=None):
            prefix, mel = carry
            kept = FRAMES_PER_CODE * (codes.shape[1] - self.look_ahead)
            draws = noise(number, codes.shape[1])
            ahead = self.look_ahead
            x, prefix = self._solve(prefix, codes, draws, mask, num_ahead=ahead, size=size)
            prefix = prefix.restart(kept, self.dit.config.max_seq_len)
            # What is held back is settled if the row ends here, and overwritten otherwise.
            at = (0, FRAMES_PER_CODE * begin, 0)
            old = jax.lax.dynamic_slice(mel, at, (rows, mask.shape[1], mel.shape[2]))
            new = jnp.where(mask[..., None], self._mel(x), old)
            return prefix, jax.lax.dynamic_update_slice(mel, new, at)

        def later(number, carry):
            begin = self.first - self.look_ahead + self.chunk * (number - 1)
            # A row whose codes all came before takes no part any more.
            real = jnp.where(len_codes > begin + self.look_ahead, len_codes - begin, 0)
            window = jax.lax.dynamic_slice_in_dim(codes, begin, width, axis=1)
            return step(carry, number, begin, window, frame_mask(real, width))

        kept = FRAMES_PER_CODE * (self.first - self.look_ahead), FRAMES_PER_CODE * self.chunk
        plan = window_plan(count, *kept, self.max_kv)
        first = (jnp.int32(0), jnp.int32(0), codes[:, : self.first])
        carry = (self._empty_prefix(rows, 0), mel)
        carry = step(carry, *first, frame_mask(len_codes, self.first), size=plan[0][-1])
        for begin, end, size in plan:
            carry = (carry[0].resized(size), carry[1])
            carry = jax.lax.fori_loop(begin, jnp.minimum(end, last + 1), later, carry)
        return carry[1][:, : FRAMES_PER_CODE * steps]

    def _last_chunk(self, len_codes: jax.Array) -> jax.Array:
        """Number of the chunk in which each row ends: int32[B]."""
        return jnp.maximum(-(-(len_codes - self.first) // self.chunk), 0)

    def _waves_by_chunks(self, mel: jax.Array, len_codes: jax.Array) -> jax.Array:
        """Vocoder and cross-fades as in `stream_chunk`, over whole answers: float32[B, A, M]."""
        hop = self.vocoder.config.hop_size
        rows, num_frames = mel.shape[0], mel.shape[1]
        settings = (self.first, self.chunk, self.look_ahead)
        plan = chunk_plan(num_frames // FRAMES_PER_CODE, *settings)
        ends_in = self._last_chunk(len_codes)
        width = max(end - begin for begin, end, _ in plan) + FRAMES_PER_CODE * self.look_ahead
        mel = jnp.pad(mel, ((0, 0), (0, width), (0, 0)))

        def speak(carry, chunk):
            out, tail = carry
            number, begin, end, given = chunk
            is_last = number == ends_in
            lens = jnp.where(is_last, FRAMES_PER_CODE * len_codes - begin, end - begin)
            lens = jnp.where(number <= ends_in, lens, 0)
            window = jax.lax.dynamic_slice_in_dim(mel, begin, width, axis=1)
            wave = jax.lax.cond(
                jnp.any(lens > 0), lambda: self._vocode(window, lens), lambda: jnp.zeros_like(tail)
            )
            # Of its last chunk, a row hears all, and without a fade.
            is_faded = (~is_last & (number > 0))[:, None]
            piece = jnp.where(is_faded, cross_fade(tail, wave, hop * given), wave)
            size = jnp.where(is_last, hop * lens, jnp.where(number < ends_in, hop * given, 0))
            old = jax.lax.dynamic_slice_in_dim(out, hop * begin, hop * width, axis=1)
            new = jnp.where(jnp.arange(hop * width) < size[:, None], piece, old)
            out = jax.lax.dynamic_update_slice_in_dim(out, new, hop * begin, axis=1)
            rest = jnp.pad(wave, ((0, 0), (0, hop * width)))
            return (out, jax.lax.dynamic_slice_in_dim(rest, hop * given, hop * width, axis=1)), None

        chunks = (jnp.arange(len(plan)), *jnp.asarray(np.array(plan, np.int32).T))
        out = jnp.zeros((rows, (num_frames + width) * hop))
        (out, _), _ = jax.lax.scan(speak, (out, jnp.zeros((rows, hop * width))), chunks)
        return out[:, : num_frames * hop]
