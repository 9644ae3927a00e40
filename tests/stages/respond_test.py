"""A Kimi-Audio in the released layout: converted, assembled, and answering wavs."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from paras2s_jax import cli
from paras2s_jax.audio import wave as wave_lib
from paras2s_jax.convert.checkpoint import Checkpoint
from paras2s_jax.data.records import Response, read_jsonl, write_jsonl
from paras2s_jax.judge.chain import Judge
from paras2s_jax.judge.ledger import Ledger
from paras2s_jax.models.sampling import Sampling
from paras2s_jax.stages import kimi, respond
from tests.stages.judge_test import Ear, Scorer

GOLDENS = Path(__file__).parents[1] / "goldens"
GREEDY = Sampling(temperature=0.0)
STEPS = 14
SAMPLES_PER_CODE = 1920  # 24 kHz / 12.5 Hz
SHORT = ("--max_steps=14", "--dtype=float32", "--batch_size=2")


@pytest.fixture(scope="module")
def wavs(tmp_path_factory) -> Path:
    """A second of speech-like noise at 16 kHz, one at 8 kHz, and one at 48 kHz in stereo."""
    folder = tmp_path_factory.mktemp("wavs")
    rng = np.random.default_rng(0)
    for name, rate_hz, channels in (("a", 16_000, 1), ("b", 8000, 1), ("c", 48_000, 2)):
        t = np.arange(rate_hz) / rate_hz
        tone = 0.2 * np.sin(2 * np.pi * 220 * t) * (1 + np.sin(2 * np.pi * 3 * t))
        noise = 0.02 * rng.normal(size=(len(t), channels))
        soundfile.write(folder / f"{name}.wav", tone[:, None] + noise, rate_hz, subtype="PCM_16")
    return folder


@pytest.fixture(scope="module")
def made(converted) -> kimi.KimiSystem:
    return kimi.assemble(converted, text=GREEDY, audio=GREEDY, dtype="float32")


def call(*args) -> int:
    return cli.main(["paras2s", *map(str, args)])


def answer(converted, source, target, *flags) -> list[Response]:
    """All answers of one call, in the order in which they were made."""
    flags = (f"--checkpoint={converted}", f"--input={source}", f"--output={target}", *flags)
    assert call("respond", *flags) == 0
    return read_jsonl(target / "responses.jsonl", Response)


def test_every_part_is_converted(release, converted):
    parts = ["", "whisper-large-v3", "glm-4-voice-tokenizer", "audio_detokenizer", "vocoder"]
    for name in parts:
        assert (converted / name / "params" / "variables").is_dir(), name
    for name in ("config.json", "tiktoken.model", "audio_detokenizer/config.yaml"):
        assert (converted / name).read_bytes() == (release / name).read_bytes()
    assert not list(converted.rglob("*.pt")) and not list(converted.rglob("*.safetensors"))


def test_export_brings_every_part_back(release, converted, tmp_path):
    assert call("export", f"--from={converted}", f"--to={tmp_path / 'back'}") == 0
    for name in ("", "whisper-large-v3", "glm-4-voice-tokenizer"):
        was, now = Checkpoint(release / name), Checkpoint(tmp_path / "back" / name)
        # What carries nothing: rotary frequencies, and what training updated the codebook from.
        left_out = {key.rpartition(".")[2] for key in set(was) - set(now)}
        assert left_out <= {"inv_freq", "ema_count", "ema_weight"}
        assert all(np.array_equal(was[key], value) for key, value in now.items())
    source = GOLDENS / "kimi_detokenizer_dit"
    for name, file in (("audio_detokenizer", "model"), ("vocoder", "vocoder")):
        was = Checkpoint(source / f"{file}.safetensors")
        now = Checkpoint(tmp_path / "back" / name)
        assert set(now) == set(was)
        assert all(np.array_equal(was[key], value) for key, value in now.items())


def test_prompt_holds_what_the_fixtures_hear(made):
    """Codes and features of a wave, out of the assembled front end, in one padded batch."""
    codes_io = np.load(GOLDENS / "glm4_voice_tokenizer" / "io.npz")
    features_io = np.load(GOLDENS / "whisper_frontend" / "io.npz")
    waves = [features_io["ragged/wave"].reshape(-1), codes_io["batch2/wave1"].reshape(-1)]
    padded = np.zeros((2, 2 * 16_000), np.float32)
    for row, wave in enumerate(waves):
        padded[row, : len(wave)] = wave
    lens = np.array([len(wave) for wave in waves], np.int32)
    prompt = jax.jit(made.policy.prompt)(made.frontend, padded, lens)
    assert prompt.mask.shape == (2, 2 * 16_000 // 1280 + 5)
    np.testing.assert_array_equal(prompt.continuous_mask.sum(-1), [20, 9])
    want = features_io["ragged/feature"][0]
    np.testing.assert_allclose(prompt.features[0, 2:22], want, atol=1e-4)
    offset = made.policy.model.config.kimia_token_offset
    got = np.asarray(prompt.audio_ids[1, 2:11]) - offset
    np.testing.assert_array_equal(got, codes_io["batch2/codes1"].reshape(-1)[:9])


def test_wavs_of_any_rate_are_answered_with_wavs(converted, wavs, tmp_path, capsys):
    responses = answer(converted, wavs, tmp_path / "out", *SHORT)
    assert [response.query_id for response in responses] == ["a", "b", "c"]
    assert "respond: 100%" in capsys.readouterr().err
    for response in responses:
        wave, rate_hz = soundfile.read(tmp_path / "out" / response.wav)
        assert rate_hz == 24_000 and wave.ndim == 1 and response.sample == 0
        num_codes, rest = divmod(len(wave), SAMPLES_PER_CODE)
        assert rest == 0 and 0 < num_codes <= STEPS - 6
        assert response.dur_s == pytest.approx(len(wave) / 24_000)
        assert np.sqrt(np.mean(wave**2)) > 1e-4
        assert isinstance(response.text, str)


def test_answers_that_are_there_are_kept(converted, wavs, tmp_path):
    out = tmp_path / "out"
    first = answer(converted, wavs, out, *SHORT)
    files = [out / response.wav for response in first]
    sounds, stamps = zip(*((wav.read_bytes(), wav.stat().st_mtime_ns) for wav in files))
    files[2].unlink()
    assert answer(converted, wavs, out, *SHORT) == first
    assert [wav.read_bytes() for wav in files] == list(sounds)
    assert [wav.stat().st_mtime_ns for wav in files][:2] == list(stamps[:2])
    # Another seed gives other answers.
    assert answer(converted, wavs, out, *SHORT, "--seed=3") != first


def test_queries_of_a_jsonl_keep_their_ids(converted, wavs, tmp_path):
    plain = respond.queries_of(wavs / "a.wav")[0][0]
    folder = Path(shutil.copytree(wavs, tmp_path / "in"))
    queries = [dataclasses.replace(plain, id=f"{n} / 2", wav=f"{n}.wav") for n in "ab"]
    write_jsonl(folder / "queries.jsonl", queries)
    source, flags = folder / "queries.jsonl", (*SHORT, "--num_samples=2")
    responses = answer(converted, source, tmp_path / "out", *flags)
    wanted = [("a / 2", 0), ("a / 2", 1), ("b / 2", 0), ("b / 2", 1)]
    assert [(response.query_id, response.sample) for response in responses] == wanted
    assert all((tmp_path / "out" / response.wav).is_file() for response in responses)


def test_a_checkpoint_is_judged_like_any_system(converted, wavs, tmp_path, monkeypatch):
    """As a folder or a server is, by the same command."""
    judge_stage = importlib.import_module("paras2s_jax.stages.judge")
    monkeypatch.setattr(
        judge_stage,
        "make_judge",
        lambda config, workdir: Judge(
            Ear(), {}, Ear(), Scorer(), Ledger(workdir / "ledger.sqlite"), progress=False
        ),
    )
    plain = respond.queries_of(wavs / "a.wav")[0][0]
    folder = Path(shutil.copytree(wavs, tmp_path / "in"))
    pair = ("sad", "surprised")
    queries = [
        dataclasses.replace(
            plain, id=name, wav=f"{name}.wav", dimension="emotion", style=one, contrast=other
        )
        for name, one, other in (("a", *pair), ("b", *reversed(pair)))
    ]
    queries = [dataclasses.replace(query, sentence_id="s") for query in queries]
    source, workdir = write_jsonl(folder / "queries.jsonl", queries), tmp_path / "run"
    system = {"kind": "checkpoint", "source": converted, "max_steps": 14, "batch_size": 2}
    flags = [f"--config.system.{key}={value}" for key, value in system.items()]
    flags += ["--config.system.dtype=float32", "--config.bench.num_resamples=20"]
    flags += [f"--queries={source}", f"--workdir={workdir}"]
    assert call("judge", "--config=configs/judge.py", *flags) == 0
    assert "| 0/2 |" in (workdir / "bench" / "table.md").read_text()
    (row, _) = read_jsonl(workdir / "bench" / "mine" / "responses.jsonl", Response)
    assert soundfile.info(workdir / "bench" / "mine" / row.wav).samplerate == 24_000


def test_the_release_limits_prompt_and_answer_together(made):
    """Without max_steps: 1500 tokens less the prompt's, of which 6 are no codes."""
    shapes = jax.eval_shape(
        lambda waves, lens: kimi.answer(
            made.policy, made.variables, made.frontend, waves, lens, jax.random.key(0)
        ),
        jax.ShapeDtypeStruct((1, 5 * 16_000), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    codes = -(-5 * 16_000 // 1280)
    assert shapes[0].text_ids.shape == (1, 1, 1500 - codes - 6)


def lost_part(folder):
    shutil.rmtree(folder / "vocoder")


def whisper_in_the_wrong_place(folder):
    shutil.rmtree(folder / "whisper-large-v3")
    shutil.copytree(folder / "vocoder", folder / "whisper-large-v3")


def lost_vocabulary(folder):
    (folder / "tiktoken.model").unlink()


def spoiled_vocabulary(folder):
    (folder / "tiktoken.model").write_text("what is this\n")


def other_specials(folder):
    listed = {"299": {"content": "<|im_kimia_text_blank|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))


def no_theta(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))


WRONG = [
    (lost_part, r"has no vocoder/: it comes with moonshotai/Kimi-Audio-7B-Instruct"),
    (whisper_in_the_wrong_place, "whisper-large-v3 holds a BigVGAN, not a WhisperASR"),
    (lost_vocabulary, "tiktoken.model: no such vocabulary"),
    (spoiled_vocabulary, "tiktoken.model:1: expected a base64 token"),
    (other_specials, "blank tokens of the model and of"),
    (no_theta, "rope_theta"),
]


def refusal(capsys, *flags) -> str:
    """The one sentence with which a command line is refused."""
    capsys.readouterr()
    assert call("respond", *flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("paras2s: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(("spoil", "sentence"), WRONG)
def test_a_wrong_checkpoint_is_refused(converted, wavs, tmp_path, capsys, spoil, sentence):
    folder = Path(shutil.copytree(converted, tmp_path / "kimi"))
    spoil(folder)
    flags = (f"--checkpoint={folder}", f"--input={wavs}", f"--output={tmp_path / 'out'}")
    assert sentence in refusal(capsys, *flags)
    assert not (tmp_path / "out").exists()


def test_torch_files_must_be_converted_first(release, wavs, tmp_path, capsys):
    flags = (f"--checkpoint={release}", f"--input={wavs}", f"--output={tmp_path / 'out'}")
    assert "paras2s convert --from=" in refusal(capsys, *flags)


def test_wrong_inputs_are_refused(converted, wavs, tmp_path, capsys):
    def says(source, *flags):
        given = (f"--checkpoint={converted}", f"--input={source}", f"--output={tmp_path / 'out'}")
        return refusal(capsys, *given, *flags)

    assert "no such file" in says(tmp_path / "none.wav")
    (tmp_path / "empty").mkdir()
    assert "nothing to answer" in says(tmp_path / "empty")
    (tmp_path / "noise.wav").write_bytes(b"no wav at all")
    assert "noise.wav: not readable as audio" in says(tmp_path / "noise.wav")
    wave_lib.save(tmp_path / "long.wav", np.zeros(101 * 16_000, np.float32))
    assert "long.wav lasts 101.0 s; longer than 100 s" in says(tmp_path / "long.wav")
    for suffix in ("wav", "flac"):
        soundfile.write(tmp_path / "empty" / f"q.{suffix}", np.zeros(800), 16_000)
    assert "two queries are called 'q'" in says(tmp_path / "empty")
    assert "batch_size" in says(wavs, "--batch_size=0")
