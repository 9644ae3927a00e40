"""Chunked log-probabilities against the plain formula, alone and on meshes; what is compiled."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paras2s_jax.models import axes, vocab
from paras2s_jax.models.vocab import token_logp
from paras2s_jax.train import sharding

ROWS, STEPS, WIDTH, VOCAB = 8, 5, 16, 24
TEMPERATURE = 0.7


def inputs(rows=ROWS):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(rows, STEPS, WIDTH)).astype(np.float32)
    kernel = rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)
    ids = rng.integers(0, VOCAB, (rows, STEPS)).astype(np.int32)
    weights = rng.normal(size=(rows, STEPS)).astype(np.float32)
    return hidden, kernel, ids, weights


def plain(hidden, kernel, ids, **_):
    logp = jax.nn.log_softmax(hidden @ kernel / TEMPERATURE)
    return (
        jnp.take_along_axis(logp, ids[..., None], axis=-1)[..., 0],
        -jnp.sum(jnp.exp(logp) * logp, axis=-1),
    )


def results(function, hidden, kernel, ids, weights):
    """Values, and gradients of a random sum of log-probabilities."""

    def total(hidden, kernel):
        found = function(hidden, kernel, ids)
        return jnp.sum(found[0] * weights), found

    (_, found), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, kernel)
    return *found, *grads


def chunked(chunk):
    return functools.partial(token_logp, temperature=TEMPERATURE, chunk=chunk)


def assert_same(found, wanted):
    for name, a, b in zip(("logp", "entropy", "d hidden", "d kernel"), found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("chunk", [None, 1, 7, 40, 100])
def test_values_and_gradients_are_those_of_the_plain_formula(chunk):
    # 40 positions: chunks of 7 leave two, 40 and 100 are all at once.
    found = jax.jit(functools.partial(results, chunked(chunk)))(*inputs())
    assert_same(found, results(plain, *inputs()))


def test_what_is_kept_for_the_backward_pass_changes_nothing(monkeypatch):
    monkeypatch.setattr(vocab, "CPU_CHUNK", 7)
    found = jax.jit(functools.partial(results, chunked(None)))(*inputs())
    assert_same(found, results(plain, *inputs()))


def num_logits(chunk):
    """Products that give logits, in the program with its gradients."""
    traced = str(jax.make_jaxpr(functools.partial(results, chunked(chunk)))(*inputs()))
    return len(re.findall(rf":f32\[\d+,{VOCAB}\] = dot_general", traced))


def test_logits_are_made_again_in_chunks_and_kept_otherwise():
    # Counted with the gradient of the kernel, which is of [WIDTH, VOCAB].
    assert num_logits(7) == 3
    assert num_logits(None) == 2


def on_mesh(sizes, rules, rows=ROWS, chunk=3):
    """The program on a mesh, and its arguments where they belong."""
    layout = sharding.Layout(sharding.make_mesh(sizes), rules)
    program = sharding.Program("logp", functools.partial(results, chunked(chunk)), layout)
    hidden, kernel, ids, weights = inputs(rows)
    box = nn.LogicallyPartitioned(kernel, (axes.EMBED, axes.VOCAB))
    return program, (layout.take(hidden), layout.place(kernel, box), ids, weights)


@pytest.mark.parametrize(
    "sizes, rules, rows",
    [
        ({"data": 8}, axes.TRAIN_RULES, 8),
        ({"data": 2, "fsdp": 2, "tensor": 2}, axes.TRAIN_RULES, 8),
        ({"fsdp": 4, "tensor": 2}, axes.TRAIN_RULES, 4),
        ({"tensor": 8}, axes.TRAIN_RULES, 3),
        # Parameters over more devices than there are rows for, and over axes without rows.
        ({"data": 2, "fsdp": 4}, ((axes.EMBED, ("data", "fsdp")), (axes.ACT_BATCH, "data")), 2),
        ({"data": 4, "fsdp": 2}, ((axes.EMBED, "fsdp"), (axes.ACT_BATCH, "data")), 4),
        # One axis for rows and for the vocabulary: the latter has it.
        ({"fsdp": 2, "tensor": 4}, ((axes.VOCAB, "tensor"), (axes.ACT_BATCH, "tensor")), 4),
    ],
)
def test_devices_share_the_work(sizes, rules, rows):
    for chunk in (3, None):
        program, args = on_mesh(sizes, rules, rows, chunk)
        assert_same(program(*args), results(plain, *inputs(rows)))


def computations(text):
    """Body of every computation in HLO text, by name."""
    found = re.findall(r"^(?:ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S)
    return dict(found)


def inside_loops(text):
    """Text of all computations that run in a loop."""
    bodies, seen = computations(text), set()
    waiting = re.findall(r"body=%?([\w.-]+)", text)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)", bodies[name])
    assert seen
    return "\n".join(bodies[name] for name in seen)


def test_no_head_is_gathered_or_reduced_within_the_loop():
    chunk = 3
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    program, args = on_mesh(sizes, axes.TRAIN_RULES, chunk=chunk)
    text = program.lower(*args).compile().as_text()
    looped = inside_loops(text)
    assert "all-gather" in text and "all-gather" not in looped
    # What the devices of the tensor axis tell each other are sums per position, and its gradient.
    reduced = re.findall(r"= f32\[([\d,]*)\]\S* all-reduce(?:-start)?\(", looped)
    assert reduced
    for shape in reduced:
        assert np.prod([int(size) for size in shape.split(",")]) <= chunk * WIDTH
    # Each device has half of the vocabulary, for one chunk at a time.
    widths = re.findall(rf"f32\[(\d+),{VOCAB // 2}\]", looped)
    assert set(map(int, widths)) <= {chunk, WIDTH}
    assert not re.findall(rf"f32\[[\d,]*,{VOCAB}\]", text)
