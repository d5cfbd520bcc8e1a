"""Spliced sequences: where their tokens come from, and what never changes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcompress.calibration import spliced

WORDS = st.lists(st.integers(10, 30), max_size=6)


@given(st.lists(WORDS, min_size=1, max_size=5), st.integers(0, 3), st.integers(0, 99))
def test_a_beginning_and_an_end_of_given_ones(sentences, copies, seed):
    given_ones = [(1, *words, 2) for words in sentences]
    found = spliced(given_ones, copies, seed=seed)
    assert len(found) == copies * len(given_ones)
    assert found == spliced(given_ones, copies, seed=seed)
    for i, sequence in enumerate(found):
        first = given_ones[i % len(given_ones)]
        assert sequence[0] == 1
        assert sequence[-1] == 2
        assert len(sequence) <= max(map(len, given_ones))
        ways = [
            (end, second)
            for end in range(1, len(sequence))
            for second in given_ones
            if sequence[:end] == first[:end] and sequence[end:] == second[len(second) - len(sequence) + end :]
        ]
        assert ways


def test_all_cuts_occur_and_copies_differ():
    found = spliced([(1, 5, 6, 7, 2), (1, 8, 9, 10, 2)], 400, seed=0)
    crossed = {sequence for sequence in found if {5, 8, 9, 10} & set(sequence) and sequence[1:2] == (5,)}
    wanted = {(*head, *tail) for head in ((1, 5), (1, 5, 6), (1, 5, 6, 7)) for tail in ((2,), (10, 2), (9, 10, 2))}
    assert {sequence for sequence in wanted if len(sequence) <= 5} <= crossed
    assert spliced([(1, 5, 6, 7, 2)] * 2, 2, seed=0) != spliced([(1, 5, 6, 7, 2)] * 2, 2, seed=1)


def test_head_and_tail_of_any_length():
    assert all(s[:2] == (1, 2) for s in spliced([(1, 2, 3, 4), (1, 2, 5, 6)], 5, head=2, tail=0, seed=0))
    assert spliced(np.array([[1, 5, 2]]), 1, seed=3) in ([(1, 5, 2)], [(1, 2)])
    assert spliced([(1, 2)], 3, seed=0) == [(1, 2)] * 3
    assert spliced([(4,), ()], 1, head=0, tail=0, seed=0)[1] in [(), (4,)]


@pytest.mark.parametrize(
    ("sequences", "options", "message"),
    [
        ([], {}, "empty"),
        ([(1, 2), (1,)], {}, "Sequence 1 has 1 tokens, fewer than head \\+ tail = 2"),
        ([(1, 2)], {"head": -1}, "negative"),
        ([(1, 2)], {"copies": -1}, "negative"),
    ],
)
def test_what_cannot_be_spliced_is_named(sequences, options, message):
    with pytest.raises(ValueError, match=message):
        spliced(sequences, **{"copies": 1, "seed": 0, **options})
