import json

import pytest

from paras2s_jax.models.whisper_ids import WhisperIds

# The control tokens of large-v3, as in its generation_config.json.
RELEASED = {
    "begin_suppress_tokens": [220, 50257],
    "decoder_start_token_id": 50258,
    "eos_token_id": 50257,
    "is_multilingual": True,
    "lang_to_id": {"<|en|>": 50259, "<|zh|>": 50260, "<|de|>": 50261},
    "max_initial_timestamp_index": 50,
    "no_timestamps_token_id": 50364,
    "suppress_tokens": [1, 2, 7],
    "task_to_id": {"transcribe": 50360, "translate": 50359},
}


def read(tmp_path, **changes) -> WhisperIds:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(RELEASED | changes))
    return WhisperIds.from_json(path)


def test_prompts_of_a_multilingual_model(tmp_path):
    ids = read(tmp_path)
    assert ids.no_speech_token_id == 50363
    assert ids.language("German") == ids.language("de") == ids.language("<|de|>") == 50261
    assert ids.prompt(50261, "transcribe", False) == (50258, 50261, 50360, 50364)
    assert ids.prompt(50259, "translate", True) == (50258, 50259, 50359)
    assert hash(ids) == hash(read(tmp_path))
    with pytest.raises(ValueError, match=r"'Klingon' is unknown.*en, zh, de"):
        ids.language("Klingon")
    with pytest.raises(ValueError, match="'sing' is unknown"):
        ids.prompt(50259, "sing", False)


def test_prompts_of_an_english_model(tmp_path):
    ids = read(tmp_path, is_multilingual=False, no_timestamps_token_id=50362)
    assert ids.prompt(None, "transcribe", False) == (50258, 50362)
    with pytest.raises(ValueError, match="English only"):
        ids.language("de")
    with pytest.raises(ValueError, match="'translate' is unknown"):
        ids.prompt(None, "translate", False)


def test_files_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"generation_config\.json: needs one id for eos_token_id"):
        read(tmp_path, eos_token_id=[1, 2])
    ids = read(tmp_path, no_timestamps_token_id=None)
    with pytest.raises(ValueError, match="knows no times"):
        ids.prompt(50259, "transcribe", True)
