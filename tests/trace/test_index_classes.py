"""Classes of indices against sets that are joined one pair at a time."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress._src.trace.index_classes import IndexClasses, Reason

COUNT = 12
INDICES = st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=6)
STEPS = st.lists(st.tuples(st.sampled_from(["unite", "first", "second", "late"]), INDICES, INDICES), max_size=8)
REASONS = {name: Reason(name, final=name != "late") for name in ("first", "second", "late")}


@settings(deadline=None, max_examples=60)
@given(STEPS)
def test_classes_are_those_of_sets(steps):
    classes, sets, told = IndexClasses(), [{k} for k in range(COUNT)], []
    assert classes.new(5).tolist() + classes.new(COUNT - 5).tolist() == list(range(COUNT))
    for what, first, second in steps:
        size = min(len(first), len(second))
        if what != "unite":
            classes.pin(np.array(first), REASONS[what])
            told += [(what, index) for index in first]
            continue
        # One index against many, too.
        classes.unite(np.array(first[:size]), np.broadcast_to(second[0], size) if size % 2 else np.array(second[:size]))
        for a, b in zip(first[:size], second[:1] * size if size % 2 else second[:size], strict=True):
            joined = sets[a] | sets[b]
            for index in joined:
                sets[index] = joined
    assert classes.find(np.arange(COUNT)).tolist() == [min(each) for each in sets]
    order = list(dict.fromkeys(what for what, _ in told))
    for index, each in enumerate(sets):
        there = [what for what in order if any(what == name and k in each for name, k in told)]
        final = [what for what in there if what != "late"]
        assert classes.is_pinned(np.array([index])).item() == bool(there)
        assert classes.is_pinned(np.array([index]), final=True).item() == bool(final)
        (reason,) = classes.reasons(np.array([index]))
        assert reason == (REASONS[(final or there)[0]] if there else None)


def test_fixed_indices_are_one_class_and_cost_no_memory():
    classes = IndexClasses()
    axis, other = classes.new(3), classes.fixed(1 << 40, REASONS["first"])
    assert other.strides == (0,)
    classes.unite(axis, classes.fixed(3, REASONS["first"]))
    assert classes.find(axis).tolist() == [0, 0, 0]
    assert classes.find(other)[-1] == 0
    assert classes.is_pinned(axis).all()
