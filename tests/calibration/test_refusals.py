"""Leaves without statistics: all of them are named at once, and cost no other leaf its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import calibration, trace, tree
from jaxcompress._src.calibration.input_statistics import batch_statistics, statistics_nbytes

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)
NAMES = ("both", "energy", "condition", "never", "partly", "good")
PARAMS = {name: jnp.asarray(RNG.normal(size=(4, 4)) / 2, jnp.float32) for name in NAMES}
REASONS = {
    "both": "contraction runs over axes",
    "energy": "contraction runs over axes",
    "condition": "it goes into the condition of a loop",
    "never": "it got no rows of inputs",
    # Its use inside the loop would be missing from the sums.
    "partly": "it goes into the condition of a loop",
}


def _apply(params, x):
    y = x @ params["good"]
    y = y @ params["both"] + x @ params["both"].T
    # The gradient multiplies the kernel from the other side.
    y = y + jax.grad(lambda x: jnp.tanh(x @ params["energy"]).sum())(x)
    y = jax.lax.while_loop(lambda y: (y @ params["condition"] @ params["partly"]).sum() > 1e6, lambda y: y / 2, y)
    y = jax.lax.cond(x.sum() > 1e6, lambda y: y @ params["never"], lambda y: y, y)
    return y @ params["partly"]


def _pattern(names):
    lines = "".join(rf"  '{name}': .*{REASONS[name]}.*\n" for name in names)
    return rf"of {len(names)} leaves:\n{lines}"


BEFORE = ("both", "condition", "energy", "partly")
"""What is refused before anything runs, in the order of the tree."""


def test_an_explicit_selection_gets_one_error():
    for gather in (
        lambda **kw: calibration.input_statistics(_apply, PARAMS, [(X,)], **kw),
        lambda **kw: next(batch_statistics(_apply, PARAMS, [(X,)], **kw)),
        lambda **kw: statistics_nbytes(_apply, PARAMS, (X,), **kw),
        lambda **kw: calibration.sequential(_apply, PARAMS, [(X,)], lambda p, s, at: (p, {}), **kw),
    ):
        for options in ({"select": tree.by_ndim(min=2)}, {"strict": True}):
            with pytest.raises(ValueError, match=_pattern(BEFORE) + r"Exclude them by `select`, or .*`strict=False`"):
                gather(**options)
    rest = tree.by_path("good|never")
    with pytest.raises(ValueError, match=r"of 1 leaf:\n  'never': it got no rows"):
        calibration.input_statistics(_apply, PARAMS, [(X,)], select=rest)
    with pytest.raises(ValueError, match=r"of 1 leaf:\n  'never': it got no rows"):
        calibration.sequential(_apply, PARAMS, [(X,)], lambda p, s, at: (p, {}), select=rest)


@pytest.mark.parametrize("options", [{}, {"select": tree.by_ndim(min=2), "strict": False}])
def test_others_go_on_with_one_warning(options):
    x = np.asarray(X, np.float64)
    names = (*BEFORE, "never")
    with pytest.warns(trace.LeftOutWarning, match=_pattern(names)) as caught:
        found = calibration.input_statistics(_apply, PARAMS, [(X,)], **options)
    assert len(caught) == 1
    assert {name for name, entry in found.items() if entry is tree.Unselected} == set(names)
    np.testing.assert_allclose(found["good"].gram, x.T @ x, rtol=1e-5, atol=1e-5)
    with pytest.warns(trace.LeftOutWarning, match=_pattern(BEFORE)):
        (entry,) = batch_statistics(_apply, PARAMS, [(X,)], **options)
    assert (entry["good"].count, entry["never"].count, entry["both"]) == (5, 0, tree.Unselected)
    with pytest.warns(trace.LeftOutWarning, match=_pattern(BEFORE)):
        assert set(statistics_nbytes(_apply, PARAMS, (X,), **options)) == {"good", "never"}
    seen = []
    with pytest.warns(trace.LeftOutWarning, match=_pattern(names)):
        calibration.sequential(_apply, PARAMS, [(X,)], lambda p, s, at: (p, seen.append(s) or {}), **options)
    assert [[name for name, own in s.items() if own is not tree.Unselected] for s in seen] == [["good"]]


def test_without_any_leaf_left_there_is_an_error():
    with pytest.raises(ValueError, match=r"of 1 leaf:\n  'both': A contraction"):
        calibration.input_statistics(lambda p, x: x @ p["both"] + x @ p["both"].T, {"both": PARAMS["both"]}, [(X,)])


def test_uses_of_one_meaning_add_up():
    x, z = np.asarray(X, np.float64), 2.0 + np.arange(12.0).reshape(3, 4)
    apply = lambda p, x, z: ((x @ p["w"]).sum(), p["w"].T @ z.T, jnp.einsum("io,bi->bo", p["w"], z))  # noqa: E731
    found = calibration.input_statistics(apply, {"w": PARAMS["good"]}, [(X, jnp.asarray(z, jnp.float32))])["w"]
    np.testing.assert_allclose(found.gram, x.T @ x + 2 * z.T @ z, rtol=1e-5)
    assert found.count == 5 + 3 + 3


def test_entries_of_a_scan_that_no_row_reached_are_named():
    params = {"w": jnp.asarray(RNG.normal(size=(3, 4, 4)), jnp.float32)}

    def apply(params, x):
        def step(y, layer):
            w, on = layer
            return jax.lax.cond(on > 0, lambda y: jnp.tanh(y @ w), lambda y: y, y), None

        return jax.lax.scan(step, x, (params["w"], jnp.array([1, 0, 1])))[0]

    seen = []

    def fn(params, statistics, layouts):
        seen.append(statistics["w"])
        return params, {}

    with pytest.warns(trace.LeftOutWarning, match=r"of 1 leaf:\n  'w\[1\]': no row reached it"):
        calibration.sequential(apply, params, [(X,)], fn)
    assert [own.count.item() for own in seen] == [5, 4, 5]
    np.testing.assert_array_equal(seen[1].gram, np.eye(4))
