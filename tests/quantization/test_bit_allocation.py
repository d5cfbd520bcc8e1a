"""Bits for each leaf under a budget, and biases that take back what rounding shifts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress._src.quantization.bit_allocation import quantize_each
from jaxcompress.calibration import fisher
from jaxcompress.quantization import (
    QuantSpec,
    allocate_bits,
    correct_biases,
    fisher_sensitivity,
    loss_sensitivity,
    quantize,
    reconstruct,
)

RNG = np.random.default_rng(0)
SPECS = [QuantSpec(bits=bits, group_size=4) for bits in (2, 3, 4, 8)]
PARAMS = {
    "a": jnp.asarray(RNG.normal(size=(8, 12)), jnp.float32),
    "b": jnp.asarray(RNG.normal(size=(12, 5)) * 3, jnp.float32),
    "c": jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32).repeat(4, 0)[:20],
    "bias": jnp.ones(5),
}
X = jnp.asarray(RNG.normal(size=(16, 8)), jnp.float32)


def _apply(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"] + params["bias"][None]


def _loss(params, x):
    return jnp.mean(jnp.square(_apply(params, x) - _apply(PARAMS, x))) + 1e-3 * jnp.sum(
        (params["c"] - PARAMS["c"]) ** 2
    )


def test_the_choice_is_the_best_of_all():
    table = loss_sensitivity(_loss, PARAMS, [X], SPECS)
    names = ["a", "b", "c"]
    # Scales of groups of 4 take 8 bits for each weight.
    for mean in (11.0, 12.5, 14.2):
        chosen = allocate_bits(table, mean_bits=mean)
        assert chosen["bias"] is jc.tree.Unselected
        sizes = sum(PARAMS[name].size for name in names)
        every = [
            (sum(table.losses[n][o] for n, o in zip(names, options, strict=True)), options)
            for options in itertools.product(range(4), repeat=3)
            if sum(int(table.stored_bits[n][o]) for n, o in zip(names, options, strict=True)) <= mean * sizes
        ]
        assert [SPECS.index(chosen[name]) for name in names] == list(min(every)[1])
    small = quantize_each(PARAMS, chosen)
    assert sum(small[name].nbits for name in names) <= 14.2 * sizes
    stored = allocate_bits(table, total_bytes=sum(int(table.stored_bits[name][1]) for name in names) // 8)
    assert sum(int(table.stored_bits[n][SPECS.index(stored[n])]) for n in names) <= sum(
        int(table.stored_bits[n][1]) for n in names
    )


def test_second_order_losses_in_numpy():
    evidence = fisher(lambda p, x: jnp.mean(_apply(p, x)), PARAMS, [X])
    table = fisher_sensitivity(PARAMS, evidence, SPECS, select=jc.tree.by_path("a|b"))
    small = quantize({"a": PARAMS["a"]}, SPECS[1])[0]["a"].materialize()
    gap = np.asarray(PARAMS["a"], np.float64) - np.asarray(small, np.float64)
    assert table.losses["a"][1] == pytest.approx(0.5 * np.sum(np.asarray(evidence["a"]) * gap**2), rel=1e-4)
    assert np.all(np.diff(table.losses["b"]) < 0)
    assert table.losses["c"] is jc.tree.Unselected


def test_budgets_that_cannot_be_met_are_named():
    table = loss_sensitivity(_loss, PARAMS, [X], SPECS)
    with pytest.raises(ValueError, match="but the smallest formats of the table need 10 bits"):
        allocate_bits(table, mean_bits=1.0)
    with pytest.raises(ValueError, match="Give one of `mean_bits` and `total_bytes`"):
        allocate_bits(table)
    with pytest.raises(ValueError, match="`specs` is empty"):
        loss_sensitivity(_loss, PARAMS, [X], [])
    with pytest.raises(ValueError, match="`batches` is empty"):
        loss_sensitivity(_loss, PARAMS, [], SPECS)


def test_corrected_biases_give_the_dense_means():
    params = {"a": PARAMS["a"], "b": PARAMS["b"], "bias": PARAMS["bias"]}
    rows = X + 1
    small, _ = quantize(params, QuantSpec(bits=2))
    corrected, shifts = correct_biases(_apply, params, small, [(rows[:9],), (rows[9:],)])
    run = jc.execute(_apply)
    wanted = _apply(params, rows).mean(axis=0)
    assert float(jnp.abs(run(small, rows).mean(axis=0) - wanted).max()) > 0.05
    np.testing.assert_allclose(run(corrected, rows).mean(axis=0), wanted, atol=1e-4)
    assert list(shifts) == ["b"]
    assert corrected["a"] is small["a"]
    with pytest.raises(ValueError, match="No kernel of a plain matmul is compressed"):
        correct_biases(_apply, params, params, [(rows,)])


def _twice_read(params, x):
    hidden = x @ params["up"] + params["first"][None]
    return ((hidden + x) + jax.nn.relu(hidden)) @ params["down"] + params["second"][None]


def test_a_kernel_whose_output_is_read_twice_is_fitted_once():
    make = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)  # noqa: E731
    params = {"up": make(8, 8), "first": make(8), "down": make(8, 5), "second": jnp.zeros(5)}
    small, _ = quantize(params, QuantSpec(bits=3))
    corrected, shifts = correct_biases(_twice_read, params, small, [(X,)])
    assert list(shifts) == ["up", "down"]
    gap = jc.execute(_twice_read)(corrected, X).mean(axis=0) - _twice_read(params, X).mean(axis=0)
    np.testing.assert_allclose(gap, 0, atol=1e-4)
    found, info = reconstruct(_twice_read, params, [(X,)], QuantSpec(bits=3))
    assert list(info) == ["up", "down"]
    gap = jc.execute(_twice_read)(found, X).mean(axis=0) - _twice_read(params, X).mean(axis=0)
    np.testing.assert_allclose(gap, 0, atol=1e-4)


def test_what_no_plain_matmul_reads_is_passed_over():
    params = {"table": PARAMS["c"], "a": PARAMS["a"], "b": PARAMS["b"], "bias": PARAMS["bias"]}

    def apply(params, ids, x):
        return _apply(params, x) + params["table"][ids].sum()

    ids = jnp.array([1, 2])
    small, _ = quantize(params, QuantSpec(bits=2))
    _, shifts = correct_biases(apply, params, small, [(ids, X)])
    assert list(shifts) == ["b"]
    experts = {"k": jnp.stack([PARAMS["a"]] * 2)}
    with pytest.raises(ValueError, match=r"No leaf is in a plain matmul: for experts"):
        reconstruct(
            lambda p, x: jnp.einsum("ebi,eij->ebj", x, p["k"]), experts, [(jnp.stack([X, X]),)], QuantSpec(bits=2)
        )
    unread = {"a": PARAMS["a"], "spare": PARAMS["a"]}
    with pytest.raises(ValueError, match="What leaf 'spare' writes is never read"):
        reconstruct(
            lambda p, x: (x @ p["a"], x @ p["spare"])[0],
            unread,
            [(X,)],
            QuantSpec(bits=2),
            select=lambda params: {"a": True, "spare": True},
        )


def test_foreign_evidence_and_budgets_are_named():
    params = {"a": PARAMS["a"], "bias": PARAMS["bias"]}
    for given, message in (
        ({"a": jnp.ones((8, 1)), "bias": jnp.ones(5)}, r"Leaf 'a' needs an entry in `fisher` of its shape, \(8, 12\)"),
        ({"bias": jnp.ones(5)}, r"Leaf 'a' needs an entry"),
        ({"a": -jnp.ones((8, 12)), "bias": jnp.ones(5)}, "`fisher` of leaf 'a' is negative"),
        ({"a": jnp.full((8, 12), jnp.nan), "bias": jnp.ones(5)}, "`fisher` of leaf 'a' holds NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            fisher_sensitivity(params, given, SPECS)
    table = fisher_sensitivity(params, {"a": jnp.ones((8, 12)), "bias": jnp.ones(5)}, [QuantSpec(bits=4)])
    with pytest.raises(ValueError, match=r"`mean_bits` is 2.0, but the smallest formats of the table need 4 bits"):
        allocate_bits(table, mean_bits=2.0, counted="codes")
    with pytest.raises(ValueError, match=r"`total_bytes` is 8, but the smallest formats of the table need \d+ bytes"):
        allocate_bits(table, total_bytes=8)
    with pytest.raises(ValueError, match="`specs` names leaf 'zzz', which `params` does not have"):
        quantize_each(params, {"zzz": QuantSpec(bits=4)})
