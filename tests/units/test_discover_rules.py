"""What units small programs have; what is gated to zero hides all else that a unit owns; what has none, and why."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from owned_units import draw, random_keep

from jaxcompress._src.trace.left_out import LeftOutWarning
from jaxcompress._src.tree.maps import map_with_path
from jaxcompress._src.units.shrink import mask_units
from jaxcompress._src.units.slices import unit_masks
from jaxcompress.quantization import QuantSpec, quantize
from jaxcompress.structured import discover_units

X = jnp.asarray(np.random.default_rng(5).normal(size=(5, 4)), jnp.float32)


class Case(NamedTuple):
    """A function of parameters of these shapes and of `X`, or of other inputs.

    Attributes:
        apply: the function.
        shapes: of the parameters.
        units: name of a group -> how many units, and for each leaf and axis what they own: (offset, width, repeat), a
            list where there are several, the whole axis by default; with "*" behind the axis where it is gated.
        inputs: others than `X`.
    """

    apply: Callable[..., Any]
    shapes: Mapping[str, tuple[int, ...]]
    units: dict[str, tuple[int, dict[str, Any]]]
    inputs: tuple[Any, ...] = ()


def interleaved_gates(p, x):
    h = x @ p["up"]
    return (h[:, ::2] * jax.nn.silu(h[:, 1::2])) @ p["down"]


def gates_by_index(p, x):
    """An order that the program fixes, and zeros behind, which nobody can take away."""
    h = x @ p["up"]
    h = h[:, np.array([0, 2, 4])] * jnp.take(h, jnp.array([1, 3, 5]), axis=1)
    return jnp.pad(h, ((0, 0), (1, 1))) @ p["down"]


def updated_in_place(p, x):
    """Rows are written into a cache, whose other rows are zeros."""
    cache = jnp.zeros((7, p["up"].shape[1]))
    return jax.lax.dynamic_update_slice(cache, x @ p["up"], (2, 0)) @ p["down"]


def side_by_side(p, x):
    """Of the ones in between nothing is known that could go."""
    h = jnp.concatenate([x @ p["a"], jnp.ones((5, 1)), jnp.flip(x, 1) @ p["b"]], axis=-1)
    return jnp.tanh(h) @ p["down"]


def in_reverse(p, x):
    return jnp.flip(x @ p["up"], axis=-1) @ p["down"]


def adapted(p, x):
    """Low rank beside a kernel: the units in between are gated in both, and the rank has units of its own."""
    return jnp.tanh(x @ p["up"]) @ (p["w"] + 0.5 * p["a"] @ p["b"])


def tied_autoencoder(p, x):
    return jax.nn.relu(x @ p["w"]) @ p["w"].T


def unrolled_stack(p, x):
    for layer in range(3):
        x = x + jnp.tanh(x @ p["up"][layer]) @ p["down"][layer]
    return x @ p["head"]


def scanned_stack(p, x):
    x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w[0]) @ w[1], None), x @ p["embed"], (p["up"], p["down"]))
    return x @ p["head"]


def looped(p, x):
    h = jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["again"] + h), x @ p["up"])
    return h @ p["down"]


def branched(p, x):
    h = jax.lax.cond(x.sum() > 0, lambda h: h @ p["a"], lambda h: jnp.tanh(h @ p["b"]), x)
    return h @ p["down"]


def experts(p, x):
    gates = jax.nn.softmax(x @ p["router"])
    inner = jax.nn.gelu(jnp.einsum("td,edf->tef", x, p["up"]))
    return jnp.einsum("te,tef,efd->td", gates, inner, p["down"])


def ragged_experts(p, x):
    sizes = jnp.array([2, 1, 2])
    return jax.lax.ragged_dot(jax.nn.gelu(jax.lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)


def looked_up_experts(p, x, chosen):
    inner = jax.nn.gelu(jnp.einsum("td,tdf->tf", x, p["up"][chosen]))
    return jnp.einsum("tf,tfd->td", inner, -p["down"][chosen])


def embedded(p, x, ids):
    """The kernel that reads the table is gated, and not the table."""
    return x[:, :3] + (p["head"].T @ p["table"][ids].T).T


def shuffled(p, x):
    """Of a channel shuffle both factors can't be units: the outer one is."""
    h = (x @ p["up"]).reshape(5, 2, 3).swapaxes(1, 2).reshape(5, 6)
    return jnp.tanh(h) @ p["down"]


def single_head(p, x):
    """Without heads, queries and keys must keep their width, and values need not."""
    q, k, v = (x @ p[name] for name in "qkv")
    return jax.nn.softmax(q @ k.T) @ v @ p["o"]


def one_key_head(p, x):
    q, k, v = (x @ p["q"]).reshape(5, 3, 2), x @ p["k"], x @ p["v"]
    weights = jax.nn.softmax(jnp.einsum("she,te->hst", q, k))
    return jnp.einsum("hst,te->she", weights, v).reshape(5, 6) @ p["o"]


def key_heads_tiled(p, x):
    """Query heads 0 and 2 go with key head 0, 1 and 3 with key head 1."""
    q, k, v = ((x @ p[name]).reshape(5, -1, 2) for name in "qkv")
    k, v = (jnp.tile(each, (1, 2, 1)) for each in (k, v))
    weights = jax.nn.softmax(jnp.einsum("she,the->hst", q, k))
    return jnp.einsum("hst,the->she", weights, v).reshape(5, 8) @ p["o"]


def heads_with_slopes(p, x):
    """Heads with constants of their own must stay; values have units inside them."""
    q, k, v = ((x @ p[name]).reshape(5, 3, 2) for name in "qkv")
    slopes = jnp.array([0.5, 0.25, 0.125])[:, None, None] * jnp.arange(5.0)[None, None]
    weights = jax.nn.softmax(jnp.einsum("she,the->hst", q, k) + slopes)
    return jnp.einsum("hst,the->she", weights, v).reshape(5, 6) @ p["o"]


def heads_with_learned_sinks(p, x):
    q, k, v = ((x @ p[name]).reshape(5, 3, 2) for name in "qkv")
    scores = jnp.einsum("she,the->hst", q, k)
    sinks = jnp.broadcast_to(p["sinks"][:, None, None], (3, 5, 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1))[..., :-1]
    return jnp.einsum("hst,the->she", weights, v).reshape(5, 6) @ p["o"]


def normed_in_groups(p, x):
    h = (x @ p["up"]).reshape(5, 3, 2)
    h = (h - h.mean(-1, keepdims=True)).reshape(5, 6) * p["scale"][None]
    return h @ p["down"]


UP, DOWN = {"up": (4, 6)}, {"down": (6, 3)}
QKV = dict.fromkeys("qkv", (4, 6))
CASES = {
    "interleaved gates": Case(
        interleaved_gates, UP | {"down": (3, 2)}, {"up": (3, {"up 1": (0, 2, 1), "down 0*": None})}
    ),
    "gates by index": Case(
        gates_by_index, UP | {"down": (5, 3)}, {"up": (3, {"up 1": (0, 2, 1), "down 0*": (1, 1, 1)})}
    ),
    "updated in place": Case(updated_in_place, UP | DOWN, {"up": (6, {"up 1": None, "down 0*": None})}),
    "side by side": Case(
        side_by_side,
        {"a": (4, 3), "b": (4, 2)} | DOWN,
        {"a": (3, {"a 1": None, "down 0*": (0, 1, 1)}), "b": (2, {"b 1": None, "down 0*": (4, 1, 1)})},
    ),
    "in reverse": Case(
        in_reverse,
        {"up": (4, 2), "down": (2, 3)},
        {
            "up#0": (1, {"up 1": (1, 1, 1), "down 0*": (0, 1, 1)}),
            "up#1": (1, {"up 1": (0, 1, 1), "down 0*": (1, 1, 1)}),
        },
    ),
    "adapted": Case(
        adapted,
        UP | {"w": (6, 3), "a": (6, 2), "b": (2, 3)},
        {"up": (6, {"up 1": None, "w 0*": None, "a 0*": None}), "a": (2, {"a 1": None, "b 0*": None})},
    ),
    "tied autoencoder": Case(tied_autoencoder, {"w": (4, 6)}, {"w": (6, {"w 1*": None})}),
    "unrolled stack": Case(
        unrolled_stack,
        {"up": (3, 4, 6), "down": (3, 6, 4), "head": (4, 2)},
        {"up": (6, {"up 2": None, "down 1*": None})},
    ),
    "scanned stack": Case(
        scanned_stack,
        {"embed": (4, 7), "up": (3, 7, 6), "down": (3, 6, 7), "head": (7, 2)},
        {
            "embed": (7, {"embed 1": None, "up 1*": None, "down 2": None, "head 0*": None}),
            "up": (6, {"up 2": None, "down 1*": None}),
        },
    ),
    "looped": Case(
        looped,
        UP | DOWN | {"again": (6, 6)},
        {"up": (6, {"up 1": None, "again 0*": None, "again 1": None, "down 0*": None})},
    ),
    "branched": Case(
        branched, {"a": (4, 6), "b": (4, 6)} | DOWN, {"b": (6, {"a 1": None, "b 1": None, "down 0*": None})}
    ),
    "experts": Case(
        experts,
        {"router": (4, 3), "up": (3, 4, 6), "down": (3, 6, 2)},
        {"up": (6, {"up 2": None, "down 1*": None})},
    ),
    "ragged experts": Case(
        ragged_experts, {"up": (3, 4, 6), "down": (3, 6, 2)}, {"up": (6, {"up 2": None, "down 1*": None})}
    ),
    "experts looked up": Case(
        looked_up_experts,
        {"up": (3, 4, 6), "down": (3, 6, 2)},
        {"up": (6, {"up 2": None, "down 1*": None})},
        (jnp.array([0, 1, 2, 0, 1]),),
    ),
    "embedded": Case(
        embedded,
        {"head": (6, 3), "table": (9, 6)},
        {"table": (6, {"table 1": None, "head 0*": None})},
        (jnp.array([0, 8, 2, 0, 1]),),
    ),
    "shuffled": Case(shuffled, UP | DOWN, {"up": (2, {"up 1": (0, 3, 1), "down 0*": (0, 1, 3)})}),
    "single head": Case(
        single_head, QKV | {"v": (4, 7), "o": (7, 2)}, {"v": (7, {"v 1": None, "o 0*": None})}
    ),
    "one key head": Case(
        one_key_head,
        {"q": (4, 6), "k": (4, 2), "v": (4, 2), "o": (6, 3)},
        {"q": (3, {"q 1": (0, 2, 1), "o 0*": (0, 2, 1)})},
    ),
    "key heads tiled": Case(
        key_heads_tiled,
        {"q": (4, 8), "k": (4, 4), "v": (4, 4), "o": (8, 3)},
        {"q": (2, {"q 1": (0, 2, 2), "k 1": (0, 2, 1), "v 1": (0, 2, 1), "o 0*": (0, 2, 2)})},
    ),
    "heads with slopes": Case(
        heads_with_slopes, QKV | {"o": (6, 3)}, {"v": (2, {"v 1": (0, 1, 3), "o 0*": (0, 1, 3)})}
    ),
    "heads with learned sinks": Case(
        heads_with_learned_sinks,
        QKV | {"o": (6, 3), "sinks": (3,)},
        {"q": (3, {f"{name} 1": (0, 2, 1) for name in "qkv"} | {"o 0*": (0, 2, 1), "sinks 0": None})},
    ),
    "normed in groups": Case(
        normed_in_groups,
        UP | DOWN | {"scale": (6,)},
        {"up": (3, {"up 1": (0, 2, 1), "scale 0": (0, 2, 1), "down 0*": (0, 2, 1)})},
    ),
}  # fmt: skip


def _params(shapes):
    return draw({name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()})


def _described(group):
    return {
        f"{part.path} {part.axis}{'*' * part.gated}": (part.offset, part.width, part.repeat) for part in group.slices
    }


def _scrambled(params, groups, keep):
    """The masked parameters, and the same with other numbers in all that the removed units own, but for what is gated.

    The gated slices are zeros, and must hide the rest: it may as well be gone.
    """
    masked = mask_units(params, groups, keep)
    owned, gated = (unit_masks(params, groups, keep, gated_only=only) for only in (False, True))
    rng = np.random.default_rng(2)

    def other(path, leaf):
        if path not in owned:
            return leaf
        numbers = jnp.asarray(rng.uniform(1, 2, size=leaf.shape), leaf.dtype)
        return jnp.where(owned[path] | ~gated.get(path, True), leaf, numbers)

    return masked, map_with_path(other, masked)


def _assert_hidden(whole, masked, scrambled):
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=0, atol=1e-5), scrambled, masked)
    changes = jax.tree.map(lambda one, two: float(jnp.abs(one - two).max()), whole, masked)
    assert max(jax.tree.leaves(changes)) > 1e-3


@pytest.fixture(scope="module")
def discovered():
    """Of all cases."""
    return {name: discover_units(case.apply, _params(case.shapes), X, *case.inputs) for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_units_of_small_programs(discovered, name):
    units = CASES[name].units
    assert {group.name: group.count for group in discovered[name]} == {
        name: count for name, (count, _) in units.items()
    }
    for group in discovered[name]:
        assert _described(group) == {part: owned or (0, 1, 1) for part, owned in units[group.name][1].items()}


def test_the_gates_of_units_of_small_programs_hide_what_else_they_own(discovered):
    @jax.jit
    def run(params):
        return {name: case.apply(params[name], X, *case.inputs) for name, case in CASES.items()}

    trees = {}
    for name, case in CASES.items():
        params, groups = _params(case.shapes), discovered[name]
        trees[name] = params, *_scrambled(params, groups, random_keep(groups))
    outputs = [run({name: three[k] for name, three in trees.items()}) for k in range(3)]
    for name in CASES:
        _assert_hidden(*(each[name] for each in outputs))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (zoo.attention, {"query/kernel": ("heads", 2)}),
        (
            zoo.scanned,
            {
                "MultiHeadDotProductAttention_0/query/kernel": ("heads", 2),
                "MultiHeadDotProductAttention_0/out/kernel": ("columns", 16),
                "Dense_1/kernel": ("columns", 32),
            },
        ),
        (zoo.nnx_mlp, {"up/kernel": ("columns", 32)}),
        (zoo.equinox_mlp, {"layers/0/weight": ("columns", 32)}),
        (zoo.einsum_experts, {"experts": ("columns", 8)}),
        (zoo.control_flow, {}),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_units_of_the_models_of_other_tests(make, expected):
    model = make()
    if not expected:
        with pytest.raises(ValueError, match="There are no units of the kinds 'heads', 'columns', 'channels'"):
            discover_units(model.apply, model.params, *model.inputs)
        return
    groups = discover_units(model.apply, model.params, *model.inputs)
    assert {group.name: (group.kind, group.count) for group in groups} == expected
    # A model of Equinox holds functions, too.
    apply = model.apply if make is zoo.equinox_mlp else jax.jit(model.apply)
    trees = model.params, *_scrambled(model.params, groups, random_keep(groups))
    _assert_hidden(*(apply(tree, *model.inputs) for tree in trees))


def _squashed_kernel(p, x):
    h = jnp.tanh(x @ p["up"]) @ jnp.tanh(p["down"])
    return h @ p["head"]


def _transformed(p, x):
    h = jnp.abs(jnp.fft.fft(jnp.tanh(x @ p["up"]) @ p["middle"]))
    return h @ p["down"]


@pytest.mark.parametrize(
    ("apply", "shapes", "units", "message"),
    [
        (
            _transformed,
            {"up": (4, 6), "middle": (6, 8), "down": (8, 2)},
            ["up"],
            "`discover_units` takes no units of 2 leaves:\n  'down': axis 0: it goes into `fft`, which is not followed",
        ),
        (
            _squashed_kernel,
            {"up": (4, 6), "down": (6, 3), "head": (3, 2)},
            ["down"],
            "'up': axis 1: a matmul reads it by weights that are no linear function of parameters",
        ),
    ],
)
def test_what_is_not_followed_is_left_out_with_a_warning(apply, shapes, units, message):
    params = _params(shapes)
    with pytest.warns(LeftOutWarning) as caught:
        groups = discover_units(apply, params, X)
    assert [group.name for group in groups] == units
    assert message in str(caught[0].message)


CONSTANT, INPUT = "a constant of the program runs along it", "it is an axis of the model's inputs"
OUTPUT, INNER = "it is an axis of the model's outputs", "it lies inside the units of an axis"


@pytest.mark.parametrize(
    ("apply", "shapes", "lines"),
    [
        (lambda p, x: x @ p["w"], {"w": (4, 6)}, [f"'w': axis 0: {INPUT}; axis 1: {OUTPUT}"]),
        (
            lambda p, x: (x @ p["w"] + jnp.sin(jnp.arange(6.0))[None]) @ p["head"],
            {"w": (4, 6), "head": (6, 2)},
            [f"'head': axis 0: {CONSTANT}"],
        ),
        (
            lambda p, x: jax.nn.softmax(x @ p["w"]) @ p["head"],
            {"w": (4, 6), "head": (6, 2)},
            [f"'head': axis 0: its units are of the kind 'hidden'; axis 1: {OUTPUT}"],
        ),
        (
            lambda p, x: jax.lax.top_k(x @ p["w"], 2)[0] @ p["head"],
            {"w": (4, 6), "head": (2, 2)},
            ["'w': axis 0: it is an axis of the model's inputs; axis 1: `top_k` runs along it"],
        ),
        (
            lambda p, x: p["table"][x.argmax(-1)] * x.sum(-1, keepdims=True),
            {"table": (4, 6)},
            [f"'table': axis 0: its rows are looked up; axis 1: {OUTPUT}"],
        ),
        (
            # The outer product of a unit with all others: one that goes leaves no kernel of a smaller model.
            lambda p, x: ((h := x @ p["w"])[:, :, None] * h[:, None]).reshape(5, 9) @ p["head"],
            {"w": (4, 3), "head": (9, 2)},
            [f"'head': axis 0: {INNER}", INNER],
        ),
        (
            lambda p, x: (x @ p["w"]) @ (x @ p["v"]).T,
            {"w": (4, 6), "v": (4, 6)},
            ["'w': axis 0: it is an axis of the model's inputs; axis 1: a matmul of two activations sums over it"],
        ),
        (
            lambda p, x: (x @ p["w"])[:, 2] + (x @ p["v"]).sum(-1) * p["unused"].sum() * 0,
            {"w": (4, 6), "v": (4, 6), "unused": (3,)},
            ["'w': axis 0: it is an axis of the model's inputs; axis 1: fixed entries of it are taken"],
        ),
    ],
)
def test_a_model_without_units_says_why(apply, shapes, lines):
    with pytest.raises(ValueError, match="There are no units of the kinds 'heads', 'columns', 'channels'") as caught:
        discover_units(apply, _params(shapes), X)
    assert all(line in str(caught.value) for line in lines), str(caught.value)


def test_unknown_kinds_are_named():
    message = "`kinds` has 'neurons'; there are 'heads', 'columns', 'channels', 'hidden'"
    with pytest.raises(ValueError, match=message):
        discover_units(in_reverse, _params(CASES["in reverse"].shapes), X, kinds=["heads", "neurons"])


def test_shapes_are_enough_and_compressed_leaves_count_as_what_they_stand_for():
    case = CASES["adapted"]
    params = _params(case.shapes)
    groups = discover_units(case.apply, params, X)
    packed, _ = quantize(params, QuantSpec(bits=8, group_size=None))
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in case.shapes.items()}
    assert discover_units(case.apply, packed, X) == groups
    assert discover_units(case.apply, shapes, jax.ShapeDtypeStruct((7, 4), jnp.bfloat16)) == groups


def test_names_do_not_depend_on_the_kinds_asked_for():
    """Heads and columns of one fused kernel."""

    def apply(p, x):
        q, k, v, inner = jnp.split(x @ p["fused"], (6, 12, 18), axis=-1)
        context = single_context(*(each.reshape(5, 3, 2) for each in (q, k, v)))
        return context @ p["o"] + jax.nn.gelu(inner) @ p["down"]

    def single_context(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("she,the->hst", q, k))
        return jnp.einsum("hst,the->she", weights, v).reshape(5, 6)

    params = _params({"fused": (4, 25), "o": (6, 3), "down": (7, 3)})
    heads, columns = discover_units(apply, params, X)
    assert (heads.name, heads.kind, columns.name, columns.kind) == ("fused#0", "heads", "fused#1", "columns")
    assert _described(heads) == {"fused 1": (0, 2, 3), "o 0*": (0, 2, 1)}
    assert _described(columns) == {"fused 1": (18, 1, 1), "down 0*": (0, 1, 1)}
    assert discover_units(apply, params, X, kinds=["columns"]) == (columns,)
