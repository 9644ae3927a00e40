from pathlib import Path

import pytest

from paras2s_jax.plan import hlo, reading

# As XLA writes it for a TPU, cut to what matters: a decode loop of 384 steps around a loop of 2
# layers, whose bound is handed in from outside, with asynchronous and fused instructions.
PROGRAM = (Path(__file__).parent / "loops.hlo").read_text()


@pytest.fixture(scope="module")
def program() -> hlo.Program:
    return hlo.Program(PROGRAM)


def test_how_often_what_runs(program):
    assert program.entry == "main"
    assert program.runs["step_body"] == 384
    assert program.runs["layer_body"] == program.runs["fused"] == 2 * 384


def test_flops_count_every_turn_of_a_loop(program):
    # Outside: 32 x 16 x 64; in every layer of every step: 32 x 128 x 64.
    assert program.flops() == 2 * 32 * 16 * 64 + 768 * 2 * 32 * 128 * 64


def test_collectives_by_their_groups_and_turns(program):
    found = {c.opcode: c for c in program.collectives()}
    reduce, gather, exchange = (found[k] for k in ("all-reduce", "all-gather", "all-to-all"))
    # A ring sends (n - 1) / n of the whole twice to reduce, once to gather or to exchange.
    assert (reduce.ways, reduce.times, reduce.wire_bytes) == (4, 768, 2 * 3 / 4 * 32 * 64 * 2)
    assert (gather.ways, gather.times, gather.wire_bytes) == (4, 384, 3 / 4 * 16 * 8 * 4)
    assert (exchange.ways, exchange.wire_bytes) == (2, 1 / 2 * 32 * 128 * 2)


def test_a_batch_written_as_a_window_is_no_work():
    # XLA:TPU writes 16 products [8, 4] x [4, 2] as a convolution along a dilated axis of 16.
    text = """ENTRY %main () -> f32[16,8,2] {
  %a = bf16[16,8,4]{2,1,0} constant({...})
  %b = bf16[16,4,2]{2,1,0} constant({...})
  ROOT %c = f32[16,8,2]{2,1,0} convolution(%a, %b), WINDOW, dim_labels=0bf_0io->0bf
}
""".replace("WINDOW", "window={size=16 stride=15 lhs_dilate=16}")
    assert hlo.Program(text).flops() == 2 * 16 * 8 * 4 * 2


def test_taps_on_padding_are_no_work():
    # 5 samples, 3 taps, a zero at either side: 13 of 15 pairs meet a sample.
    text = """ENTRY %main () -> f32[1,5,7] {
  %a = f32[1,5,2]{2,1,0} constant({...})
  %b = f32[3,2,7]{2,1,0} constant({...})
  ROOT %c = f32[1,5,7]{2,1,0} convolution(%a, %b), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f
}
"""
    assert hlo.Program(text).flops() == 2 * 13 * 2 * 7


def test_sizes_of_shapes():
    assert hlo.Shape("bf16", (3, 5)).num_bytes == 30
    assert hlo.Shape("pred", (7,)).num_bytes == 7
    assert hlo.Shape("s4", (8,)).num_bytes == 4
    assert hlo.Shape("f32", ()).num_bytes == 4


def test_a_loop_without_a_bound_is_an_error():
    text = PROGRAM.replace("constant(384)", "parameter(0)")
    with pytest.raises(ValueError, match=r"loop loop has no constant bound"):
        _ = hlo.Program(text).runs


def test_text_that_is_no_program_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.Program("module @jit_f {}")


def test_the_loop_over_steps_is_found_by_its_length(program):
    assert reading.decode_body(program, 384) == "step_body"
    with pytest.raises(ValueError, match="no loop of 99 steps"):
        reading.decode_body(program, 99)


def test_whole_caches_that_are_copied_are_found(program):
    size = 2 * 4 * 384 * 128 * 2
    # The weights are larger, but have no axis of 384 steps.
    assert reading.cache_copies(program, "step_body", 384, size) == ["copy.7"]
    assert reading.cache_copies(program, "step_body", 384, size + 1) == []


def test_collectives_per_layer(program):
    def count(*opcodes):
        return reading.per_layer(program, "step_body", 384, 2, opcodes)

    assert count("all-reduce") == 1.0
    assert count("all-reduce", "all-to-all") == 2.0
    # That of the head is in no layer.
    assert count("all-gather") == 0.0


def test_the_largest_logits_are_those_in_memory(program):
    # Inside of the fusion there are 4096 rows that never exist; 64 rows are a head's gradient.
    assert reading.largest_logits(program, [1000], widths=[64]) == 512
    assert reading.largest_logits(program, [1000], widths=[64, 512]) == 0


def test_heads_brought_together_again_and_again(program):
    assert [c.times for c in reading.heads_gathered(program, 16 * 8 * 4)] == [384]
    assert reading.heads_gathered(program, 16 * 8 * 4 + 1) == []
    by_hand = PROGRAM.replace("jit(rollout)/while/body/text_head", "jvp()/shard_map/all_gather")
    assert len(reading.heads_gathered(hlo.Program(by_hand), 16 * 8 * 4)) == 1


# A product overlapped with a gather of its factor: a loop that counts to 8 by twos, each turn of
# which also advances a gather that belongs to the product after it.
OVERLAPPED = """%gather_step (p0: bf16[4,8], p1: bf16[8,16]) -> bf16[4,16] {
  %p0 = bf16[4,8]{1,0} parameter(0)
  %p1 = bf16[8,16]{1,0} parameter(1)
  %part = bf16[64,32]{1,0} all-gather(%p1), channel_id=7, GROUPS
  ROOT %product = bf16[4,16]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%gather_end (p0: bf16[8,16]) -> bf16[64,32] {
  %p0 = bf16[8,16]{1,0} parameter(0)
  ROOT %rest = bf16[64,32]{1,0} all-gather(%p0), channel_id=7, GROUPS
}

%body (state: (bf16[4,8], bf16[8,16], s32[])) -> (bf16[4,8], bf16[8,16], s32[]) {
  %state = (bf16[4,8]{1,0}, bf16[8,16]{1,0}, s32[]) parameter(0)
  %x = bf16[4,8]{1,0} get-tuple-element(%state), index=0
  %w = bf16[8,16]{1,0} get-tuple-element(%state), index=1
  %i = s32[] get-tuple-element(%state), index=2
  %moved = bf16[8,16]{1,0} collective-permute(%w), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %done = bf16[4,16]{1,0} fusion(%x, %moved), kind=kOutput, calls=%gather_step
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %out = (bf16[4,8]{1,0}, bf16[8,16]{1,0}, s32[]) tuple(%x, %moved, %next)
}

%condition (state: (bf16[4,8], bf16[8,16], s32[])) -> pred[] {
  %state = (bf16[4,8]{1,0}, bf16[8,16]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=2
  %bound = s32[] constant(8)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (p: bf16[4,8], w: bf16[8,16]) -> bf16[64,32] {
  %p = bf16[4,8]{1,0} parameter(0)
  %w = bf16[8,16]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (bf16[4,8]{1,0}, bf16[8,16]{1,0}, s32[]) tuple(%p, %w, %zero)
  %loop = (bf16[4,8]{1,0}, bf16[8,16]{1,0}, s32[]) while(%start), condition=%condition, body=%body
  ROOT %whole = bf16[64,32]{1,0} fusion(%w), kind=kLoop, calls=%gather_end
}
""".replace("GROUPS", "replica_groups=[4,16]<=[64], dimensions={0}")


@pytest.mark.parametrize("most", ["s32[] constant(8)", "s32[1]{0} constant({8})"])
def test_loops_that_start_late_and_may_end_early(most):
    """From 3 by twos to the smaller of 8 and what is not known: 3, 5, 7."""
    text = OVERLAPPED.replace("%zero = s32[] constant(0)", "%zero = s32[] constant(3)")
    handed_in = "%bound = s32[] get-tuple-element(%state), index=3"
    text = text.replace("%bound = s32[] constant(8)", handed_in)
    limit = f"%most = {most}\n  %last = s32[] minimum(%some, %most)\n  %start ="
    text = text.replace("%start =", limit).replace(
        "tuple(%p, %w, %zero)", "tuple(%p, %w, %zero, %last)"
    )
    text = text.replace("tuple(%x, %moved, %next)", "tuple(%x, %moved, %next, %i)")
    assert hlo.Program(text).runs["body"] == 3


def test_loops_that_count_by_twos_and_hidden_collectives():
    program = hlo.Program(OVERLAPPED)
    assert program.runs["body"] == 4
    assert program.flops() == 4 * 2 * 4 * 8 * 16
    found = {c.opcode: c for c in program.collectives()}
    assert (found["collective-permute"].times, len(found)) == (4, 2)
    # One gather, though its pieces are written down in two places.
    assert (found["all-gather"].times, found["all-gather"].wire_bytes) == (1, 15 / 16 * 64 * 32 * 2)
