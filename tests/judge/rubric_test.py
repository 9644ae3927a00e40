import pytest

from paras2s_jax.judge import rubric

SORRY = [["so sorry", "that is hard"], ["here for you", "take your time"]]
GREAT = [["congratulations", "how wonderful"], ["tell me more", "here for you"]]


def test_exact_cue_is_one_wherever_it_stands():
    assert rubric.cue_credit("so sorry", ["i", "am", "so", "sorry", "about", "that"]) == 1.0
    assert rubric.cue_credit("Take your time!", ["take", "your", "time"]) == 1.0


def test_slip_earns_part_of_the_credit():
    # "congratulations" has 15 letters; one wrong letter: similarity 14/15, so by the line from
    # (0.8, 0.5) to (1, 1): 0.5 + 2.5 * (14/15 - 0.8) = 5/6.
    assert rubric.cue_credit("congratulations", ["congradulations"]) == pytest.approx(5 / 6)
    # Two wrong letters of 8 (with the space): similarity 6/8 < 0.8.
    assert rubric.cue_credit("so sorry", ["so", "solly"]) == 0.0


def test_words_are_whole():
    assert rubric.cue_credit("art", ["a", "party"]) == 0.0
    assert rubric.cue_credit("sad", ["sat"]) == 0.0


def test_split_and_joined_words_are_heard():
    # One space too many among 9 characters: 1 - 1/9 = 8/9, so 0.5 + 2.5 * (8/9 - 0.8) = 13/18.
    assert rubric.cue_credit("wonderful", ["wonder", "ful"]) > 0.5
    assert rubric.cue_credit("thank you", ["thankyou"]) == pytest.approx(13 / 18)


@pytest.mark.parametrize(
    ("cue", "heard"), [("fortunately", "unfortunately"), ("interesting", "uninteresting")]
)
def test_the_opposite_is_not_a_slip(cue, heard):
    assert rubric.cue_credit(cue, [heard]) == 0.0
    assert rubric.cue_credit(heard, [cue]) == 0.0


def test_acts_are_averaged_over_their_best_cue():
    # The first act by both of its cues (counts once), the second not at all: (1 + 0) / 2.
    words = ["so", "sorry", "that", "is", "hard"]
    assert rubric.acts_credit(SORRY, words) == 0.5
    assert rubric.acts_credit(SORRY, ["so", "sorry", "take", "your", "time"]) == 1.0
    assert rubric.acts_credit(SORRY, []) == 0.0


def test_shared_cues_count_for_and_never_against():
    found = rubric.find("so sorry, I am here for you", SORRY, [GREAT])
    assert found == (1.0, 0.0, 0.0)
    # Without its shared cue, GREAT asks for both of its acts.
    found = rubric.find("So sorry! Congratulations, tell me more.", SORRY, [GREAT])
    assert found == (0.5, 1.0, 0.0)


def test_worst_contrast_counts():
    found = rubric.find("Congratulations!", SORRY, [[["never said"]], GREAT])
    assert found == (0.0, 0.5, 0.0)


def test_bland_is_its_best_cue():
    assert rubric.find("I see, all right.", SORRY, [GREAT], ("okay", "i see")).bland == 1.0


def test_no_words_no_credit():
    assert rubric.find("  ...  ", SORRY, [GREAT], ("i see",)) == (0.0, 0.0, 0.0)
