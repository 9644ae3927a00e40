"""Supervised training and likelihoods through tf.data, on tones."""

import jax
import numpy as np
import optax
import pytest

from paras2s_jax.align import pairs, retention, sft
from paras2s_jax.data.batches import Batches
from paras2s_jax.train.metrics import MetricWriter


def _batches(spoken, tokenizer, **kwargs):
    queries, responses, folder = spoken
    rows, root = pairs.pair_rows(queries, folder, responses, folder)
    return Batches(
        sft.tokenize_rows(rows, tokenizer),
        root=root,
        audio_keys=sft.AUDIO_KEYS,
        token_keys=sft.TOKEN_KEYS,
        len_buckets_s=(0.4,),
        token_buckets=(8,),
        **kwargs,
    )


@pytest.fixture(scope="module")
def trained(tiny, spoken, tmp_path_factory):
    """(variables after some steps, the run's folder)."""
    folder = tmp_path_factory.mktemp("sft")
    writer = MetricWriter(folder)
    variables = sft.train(
        tiny.policy,
        tiny.variables,
        tiny.frontend,
        _batches(spoken, tiny.tokenizer, batch_size=6, repeat=True, shuffle=True),
        optimizer=optax.adam(1e-2),
        num_steps=30,
        rng=jax.random.key(0),
        trainable="stack|layers|head|embed",
        accum_steps=2,
        writer=writer,
        log_every=5,
    )
    writer.close()
    return variables, folder


def _evaluate(tiny, variables, spoken, batch_size):
    batches = _batches(spoken, tiny.tokenizer, batch_size=batch_size)
    return sft.evaluate(tiny.policy, variables, tiny.frontend, batches)


def test_training_fits_the_demonstrations(tiny, spoken, trained):
    before = _evaluate(tiny, tiny.variables, spoken, 6)
    after = _evaluate(tiny, trained[0], spoken, 6)
    for stream in ("text", "audio"):
        assert after[f"nll/{stream}"] < 0.5 * before[f"nll/{stream}"]
    rows = (trained[1] / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 6 and '"nll/audio"' in rows[0]


def test_only_what_matches_is_trained(tiny, trained):
    same = jax.tree.map(np.array_equal, trained[0]["params"], tiny.variables["params"])
    assert all(jax.tree.leaves(same["adaptor"]))
    assert not any(jax.tree.leaves(same["text_head"]))


def test_filling_rows_do_not_count(tiny, spoken):
    # Six rows in batches of four: the last two places repeat real rows with valid False.
    whole, ragged = (_evaluate(tiny, tiny.variables, spoken, size) for size in (6, 4))
    for name, value in whole.items():
        assert ragged[name] == pytest.approx(value, rel=1e-5), name


def test_nll_is_the_mean_over_both_streams(tiny, spoken):
    # Text: letters and an end, each a token ("oh" 3, "sad" 4, three of each): 21 tokens.
    # Audio: 2, 3 or 4 codes and an end, two of each: 24 tokens.
    found = _evaluate(tiny, tiny.variables, spoken, 6)
    want = (21 * found["nll/text"] + 24 * found["nll/audio"]) / 45
    assert found["nll"] == pytest.approx(want, rel=1e-5)


def test_retention_compares_before_and_after(tiny, spoken, trained):
    batches = _batches(spoken, tiny.tokenizer, batch_size=6)
    # Backwards: from the trained policy to the random one, likelihood falls.
    grown = retention.nll_growth(tiny.policy, trained[0], tiny.variables, tiny.frontend, batches)
    want = grown["nll_after"] / grown["nll_before"] - 1
    assert grown["nll_growth"] == pytest.approx(want) and grown["nll_growth"] > 1.0
    same = retention.nll_growth(tiny.policy, tiny.variables, tiny.variables, tiny.frontend, batches)
    assert same["nll_growth"] == 0.0
