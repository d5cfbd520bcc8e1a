import itertools

import flax
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxcompress.distillation import layer_map, select_layers


@pytest.mark.parametrize(("student", "teacher"), [(1, 1), (1, 12), (5, 12), (12, 12), (4, 24)])
def test_layer_map_laws(student, teacher):
    pairs = layer_map(student, teacher)
    assert [i for i, _ in pairs] == list(range(student + 1))
    assert pairs[0] == (0, 0)
    assert pairs[-1] == (student, teacher)
    assert all(b - a >= 1 for (_, a), (_, b) in itertools.pairwise(pairs))
    last = layer_map(student, teacher, strategy="last")
    assert last == tuple((student - i, teacher - i) for i in reversed(range(student)))


def test_layer_map_errors():
    for student in (0, 13):
        with pytest.raises(ValueError, match="A student has 1 to 12 layers"):
            layer_map(student, 12)
    # The second is raised by the annotation, which tests check.
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="strategy"):
        layer_map(2, 12, strategy="first")


def _layer(i):
    return {"kernel": jnp.full((2, 3), i), "bias": jnp.full(3, 10 * i)}


def _marks(tree):
    return jax.tree.map(lambda x: int(x.reshape(-1)[0]), tree)


@pytest.mark.parametrize("freeze", [lambda tree: tree, flax.core.freeze])
def test_select_layers_of_a_bert_tree(freeze):
    params = freeze(
        {
            "bert": {"encoder": {"layer": {str(i): _layer(i) for i in range(12)}}, "pooler": _layer(99)},
            "head": _layer(7),
        }
    )
    student = select_layers(params, r"bert/encoder/layer/(\d+)/.*", [3, 11])
    assert type(student) is type(params)
    expected = {"0": {"kernel": 3, "bias": 30}, "1": {"kernel": 11, "bias": 110}}
    assert _marks(student)["bert"]["encoder"]["layer"] == expected
    assert student["head"]["kernel"] is params["head"]["kernel"]
    assert len(params["bert"]["encoder"]["layer"]) == 12


def test_select_layers_by_prefix_in_lists_and_with_integer_keys():
    flat = {**{f"block_{i}": _layer(i) for i in range(11)}, "norm": jnp.ones(2)}
    student = select_layers(flat, r"block_(\d+)/.*", [10, 0])
    assert sorted(student) == ["block_0", "block_1", "norm"]
    assert _marks(student)["block_0"] == {"kernel": 10, "bias": 100}
    in_list = select_layers({"h": [_layer(i) for i in range(4)]}, r"h/(\d+)/.*", [1, 3, 3])
    assert [layer["kernel"] for layer in _marks(in_list)["h"]] == [1, 3, 3]
    in_tuple = select_layers(tuple(_layer(i) for i in range(4)), r"(\d+)/.*", [2])
    assert isinstance(in_tuple, tuple)
    assert _marks(in_tuple) == ({"kernel": 2, "bias": 20},)
    by_number = select_layers({"h": {i: _layer(i) for i in range(4)}}, r"h/(\d+)/.*", [3])
    assert _marks(by_number) == {"h": {0: {"kernel": 3, "bias": 30}}}


def test_select_layers_cuts_every_stack_that_matches():
    params = {side: {str(i): _layer(i) for i in range(3)} for side in ("encoder", "decoder", "other")}
    student = select_layers(params, r"(?:en|de)coder/(\d+)/.*", [2])
    assert _marks(student["encoder"]) == _marks(student["decoder"]) == {"0": {"kernel": 2, "bias": 20}}
    assert len(student["other"]) == 3


def test_select_layers_errors():
    params = {"layer": {"0": _layer(0), "1": _layer(1)}, "head": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"No layers \[2\] at 'layer'; it has the keys \['0', '1'\]"):
        select_layers(params, r"layer/(\d+)/.*", [0, 2])
    with pytest.raises(ValueError, match=r"matches no leaf\. The leaves are:\n  head\n  layer/0/bias"):
        select_layers(params, r"block/(\d+)/.*", [0])
    with pytest.raises(ValueError, match="needs one group"):
        select_layers(params, r"layer/\d+/.*", [0])
    with pytest.raises(ValueError, match="must be a number, got 'bias'"):
        select_layers(params, r"layer/\d+/(.*)", [0])
    for wrong in ([], [True, False], [0.5]):
        with pytest.raises(ValueError, match=r"`layers` must be numbers of layers, at least one, got \["):
            select_layers(params, r"layer/(\d+)/.*", wrong)
    with pytest.raises(ValueError, match="Layer 1 would become '0' at 'layer'"):
        select_layers(params, r"layer/([1-9])/.*", [1])


def test_a_student_with_all_layers_is_its_teacher():
    params = {"layer": {str(i): _layer(i) for i in range(3)}}
    student = select_layers(params, r"layer/(\d+)/.*", range(3))
    assert jax.tree.structure(student) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, student, params)
