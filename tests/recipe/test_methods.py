"""The one table of methods: it has every one-shot method and transform, and each runs from a recipe file."""

import inspect
import itertools
import types

import jax
import numpy as np
import pytest
from small_bert import small_classifier

import jaxcompress as jc
from jaxcompress import gates, pruning, quantization, recipe, structured, tree
from jaxcompress._src.arrays.sparse import SparseArray
from jaxcompress._src.recipe.methods import METHODS
from jaxcompress._src.recipe.options import NEEDED
from jaxcompress._src.recipe.steps import step_options
from jaxcompress._src.types import Params, Transform
from jaxcompress.arrays import (
    AdditiveCodebookArray,
    BitmaskSparseArray,
    CodebookArray,
    InputQuantizedArray,
    LowRankArray,
    NMSparseArray,
    QuantizedArray,
)
from jaxcompress.recipe import Tokens

FACADES = (pruning, quantization, jc.clustering, jc.lowrank, gates, structured)
INSIDE = {"refit": "what `fisher` and `hard_concrete` end with"}
"""One-shot functions that are a part of other rows: they need a choice of units, which no file can say."""


def _public_methods():
    """One-shot methods take `params` and return `(params, info)`; transforms are made from keywords."""
    for facade in FACADES:
        for name, function in vars(facade).items():
            if isinstance(function, types.FunctionType) and not name.startswith("_"):
                signature = inspect.signature(function)
                returns = signature.return_annotation
                is_pair = getattr(returns, "__origin__", None) is tuple and len(returns.__args__) == 2
                of_params = "params" in signature.parameters and is_pair and returns.__args__[0] is Params
                if returns is Transform or (of_params and name not in INSIDE):
                    yield function


def test_the_table_has_every_one_shot_method_and_transform_of_the_facades_and_nothing_else():
    rows = [method.function for entries in METHODS.values() for method in entries.values()]
    assert len(set(rows)) == len(rows)
    public, named = ({function.__name__ for function in functions} for functions in (_public_methods(), rows))
    assert public == named, (
        f"{sorted(public - named)} need rows in `METHODS` (`_src/recipe/methods.py`); {sorted(named - public)} are "
        "rows, but no facade has them as a function `-> Transform` or `(params, ...) -> tuple[Params, ...]`."
    )
    assert {inspect.unwrap(function) for function in _public_methods()} == set(map(inspect.unwrap, rows))


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage, entries in METHODS.items() for name in entries])
def test_every_option_of_every_method_is_explained(recipe_of, stage, name):
    method = METHODS[stage][name]
    assert method.summary
    options = step_options(method).values()
    assert all(len(option.help) > 8 for option in options)
    elsewhere = [option.name for option in options if option.help.startswith(("see ", "as for ", "as in "))]
    assert not elsewhere
    needed = [option.name for option in options if option.default is NEEDED]
    if needed:
        with pytest.raises(ValueError, match=f"the option '{needed[0]}' is needed"):
            recipe_of(f"[[{stage}]]\nmethod = '{name}'\n")


ROWS = 24
DISTIL = """
[distil]
epochs = 1
learning_rate = 1e-3
batch_size = 8
soft_targets = 1.0
widths = [8]
"""
CALIBRATE = "[calibrate]\nrows = 16\nbatch_size = 16\n"
LAYERS = 2
LAYER = "bert/encoder/layer/{}/{}/kernel"
PLACES = (
    "attention/self/query", "attention/self/key", "attention/self/value", "attention/output/dense",
    "intermediate/dense", "output/dense",
)  # fmt: skip
KERNELS = [LAYER.format(layer, place) for layer in range(LAYERS) for place in PLACES]


@pytest.fixture(scope="module")
def model():
    module = small_classifier(num_hidden_layers=LAYERS, hidden_size=16, num_attention_heads=2, intermediate_size=32)
    params = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    return module, jax.device_get(params)


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(0)
    ids = tuple(tuple(rng.integers(1, 40, size=8).tolist()) for _ in range(ROWS))
    return Tokens(ids=ids, labels=rng.integers(0, 2, ROWS).astype(np.int32), pad_id=0)


@pytest.fixture
def recipe_of(tmp_path):
    def read(text):
        (tmp_path / "recipe.toml").write_text(text)
        return recipe.read_recipe(tmp_path / "recipe.toml")

    return read


def _places(*tables):
    """A kernel for each method of some tables, by name."""
    names = list(itertools.chain(*tables))
    assert len(names) <= len(KERNELS), f"{len(names)} methods need a kernel each: raise `LAYERS`."
    return dict(zip(names, KERNELS, strict=False))


def _steps(stage, methods, places):
    """One step for each method, on its kernel."""
    return "".join(
        f"[[{stage}]]\nmethod = '{name}'\nselect = '{places[name]}'\n{options}\n"
        for name, (options, *_) in methods.items()
    )


def _leaves(params):
    return dict(tree.leaves_with_paths(params))


def _zeros(leaf):
    return float((np.asarray(jc.materialize({"leaf": leaf})["leaf"]) == 0).mean())


HALF = "sparsity = 0.5\n"
# Options, and the share of zeros in the end.
PRUNING_TRANSFORMS = {
    "gradual": (HALF + "every = 1\n", 0.5),
    "straight_through_magnitude": (HALF + "every = 1\n", 0.5),
    "movement": (HALF + "every = 1\n", 0.5),
    # Its scores begin above its threshold.
    "soft_movement": ("threshold = 0.4\nstrength = 0.1\n", 0.0),
    "rigl": (HALF + "until = 0.7\nevery = 1\n", 0.5),
    "sparse_evolution": (HALF + "until = 0.7\nevery = 1\n", 0.5),
    "sr_ste": ("n = 2\nm = 4\n", 0.5),
    # As strong as to leave nothing.
    "group_lasso": ("strength = 100.0\ngrouping = 'outputs'\n", 1.0),
}
# Options, and the kind of array in the end.
QUANTIZATION_TRANSFORMS = {
    "quantization_aware": ("bits = 4\n", QuantizedArray),
    "lsq": ("bits = 3\n", QuantizedArray),
    "lsq_inputs": ("bits = 8\nper_tensor = true\n", InputQuantizedArray),
    "pact_inputs": ("bits = 8\n", InputQuantizedArray),
}


def test_every_transform_runs_in_one_training(model, tokens, recipe_of):
    places = _places(PRUNING_TRANSFORMS, QUANTIZATION_TRANSFORMS)
    text = _steps("prune", PRUNING_TRANSFORMS, places) + _steps("quantize", QUANTIZATION_TRANSFORMS, places)
    text += "[[lowrank]]\nmethod = 'rank_gates'\nselect = 'bert/pooler/dense/kernel'\nshare = 0.5\n"
    text += "[[cluster]]\nmethod = 'trained_codebooks'\nselect = 'classifier/kernel'\nvalues = 4\n"
    read = recipe_of(text + DISTIL + CALIBRATE)
    trained = {step.name for _, step in read.steps}
    assert trained == {name for entries in METHODS.values() for name, row in entries.items() if row.trains} - {
        "hard_concrete",
        "lora",
    }
    # Three steps are too few for the gates to close.
    with pytest.warns(jc.schedules.UnfinishedScheduleWarning, match="open directions"):
        leaves = _leaves(recipe.compress(read, *model, tokens))
    for name, (_, zeros) in PRUNING_TRANSFORMS.items():
        leaf = leaves[places[name]]
        assert _zeros(leaf) == pytest.approx(zeros, abs=0.01), name
        assert isinstance(leaf, NMSparseArray if name == "sr_ste" else BitmaskSparseArray), name
    for name, (_, kind) in QUANTIZATION_TRANSFORMS.items():
        assert type(leaves[places[name]]) is kind, name
    assert [leaves[places[name]].bits for name in ("quantization_aware", "lsq")] == [4, 3]
    # All directions are open, so that two factors would be larger than the kernel.
    factorized = leaves["bert/pooler/dense/kernel"]
    assert 0 < np.abs(factorized - _leaves(model[1])["bert/pooler/dense/kernel"]).max() < 0.1
    assert isinstance(leaves["classifier/kernel"], CodebookArray)


def test_factors_are_trained_beside_quantized_weights(model, tokens, recipe_of):
    """A training of its own: everything but the factors is frozen."""
    quantized, plain = KERNELS[0], KERNELS[-1]
    text = f"[[quantize]]\nselect = '{quantized}'\nbits = 4\nfrozen = true\n"
    text += f"[[lowrank]]\nmethod = 'lora'\nselect = '{quantized}|{plain}'\nrank = 2\nalpha = 4.0\n"
    dense, leaves = _leaves(model[1]), _leaves(recipe.compress(recipe_of(text + DISTIL), *model, tokens))
    assert isinstance(leaves[quantized], LowRankArray)
    assert isinstance(leaves[quantized].residual, QuantizedArray)
    for path, leaf in dense.items():
        if path not in (quantized, plain):
            np.testing.assert_array_equal(leaves[path], leaf, err_msg=path)
    change = np.linalg.svd(np.asarray(leaves[plain], np.float64) - dense[plain], compute_uv=False)
    assert change[0] > 1e-6
    assert change[2] < 1e-6 + 1e-3 * change[0]
    pruned = f"[[prune]]\nselect = '{plain}'\nsparsity = 0.5\n" + text
    with pytest.raises(ValueError, match=r"is in \[\[prune\]\] 1, and \[\[lowrank\]\] 1, 'lora', would give its zeros"):
        recipe.compress(recipe_of(pruned + DISTIL), *model, tokens)


# Options; half of the weights become zero.
ONE_SHOT_PRUNING = {
    "magnitude": ("pattern = '2:4'\n",),
    "wanda": (HALF,),
    "sparsegpt": (HALF,),
    "alps": ("pattern = '2:4'\n",),
}
# Options; two factors.
LOW_RANK = {
    "svd": ("rank = 4\n",),
    "activation_svd": ("rank = {rule = 'budget', share = 0.5}\n",),
    "fisher_svd": ("rank = {rule = 'energy', share = 0.5}\n",),
    "with_residual": ("rank = 2\ncompress = {method = 'gptq', bits = 4, group_size = 8}\n",),
}
# Options, and the kind of array.
CLUSTERING = {
    "cluster": ("values = 4\n", CodebookArray),
    "additive_quantize": ("length = 4\ntables = 1\nvalues = 8\n", AdditiveCodebookArray),
}


def test_inputs_are_quantized_behind_the_training(model, tokens, recipe_of):
    select = f"select = '{KERNELS[0]}'"
    rounded = f"[[quantize]]\n{select}\nbits = 4\ngroup_size = 8\n"
    text = f'{rounded}[[quantize]]\nmethod = "quantize_inputs"\n{select}\nbits = 8\n'
    without, with_inputs = (_leaves(recipe.compress(recipe_of(t + DISTIL), *model, tokens)) for t in (rounded, text))
    leaf = with_inputs[KERNELS[0]]
    assert isinstance(leaf, InputQuantizedArray)
    assert isinstance(leaf.weight, QuantizedArray)
    np.testing.assert_array_equal(leaf.weight.codes(), without[KERNELS[0]].codes())


def test_one_shot_pruning_low_rank_and_clusters_run(model, tokens, recipe_of):
    places = _places(ONE_SHOT_PRUNING, LOW_RANK, CLUSTERING)
    text = _steps("prune", ONE_SHOT_PRUNING, places) + "[[prune]]\nmethod = 'tune_masked'\n"
    text += _steps("lowrank", LOW_RANK, places)
    text += "[[lowrank]]\nmethod = 'compress_factors'\ncompress = {method = 'quantize', bits = 8}\n"
    text += _steps("cluster", CLUSTERING, places)
    notes = Notes()
    leaves = _leaves(recipe.compress(recipe_of(text + CALIBRATE), *model, tokens, progress=notes))
    for name in ONE_SHOT_PRUNING:
        assert _zeros(leaves[places[name]]) == 0.5, name
        assert isinstance(leaves[places[name]], SparseArray), name
    for name in LOW_RANK:
        assert type(leaves[places[name]]) is LowRankArray, name
        assert isinstance(leaves[places[name]].left, QuantizedArray), name
    assert leaves[places["svd"]].rank == 4
    assert isinstance(leaves[places["with_residual"]].residual, QuantizedArray)
    for name, (_, kind) in CLUSTERING.items():
        assert type(leaves[places[name]]) is kind, name
    steps = len(ONE_SHOT_PRUNING) + 1
    assert all(any(line.startswith(f"[[prune]] {i}, ") for line in notes.lines) for i in range(1, steps + 1))
    assert "mean relative output error" in " ".join(notes.lines)


# Options, and the bits of the codes.
ROUNDING = {
    "quantize": ("bits = 4\n", 4),
    "fixed_point": ("bits = 6\n", 6),
    "hqq": ("bits = 4\ngroup_size = 8\nsymmetric = false\n", 4),
    "awq": ("bits = 4\ngroup_size = 8\n", 4),
    "gptq": ("bits = 4\ngroup_size = 8\n", 4),
    "gptq_sequential": ("bits = 4\ngroup_size = 8\n", 4),
    "reconstruct": ("bits = 4\ngroup_size = 8\n", 4),
}


def test_every_rounding_method_runs(model, tokens, recipe_of):
    places = _places(ROUNDING)
    text = "[[quantize]]\nmethod = 'smooth'\n" + _steps("quantize", ROUNDING, places)
    text += "[[quantize]]\nmethod = 'correct_biases'\n"
    text += f"[[quantize]]\nmethod = 'quantize_inputs'\nselect = '{places['quantize']}'\nbits = 8\n"
    read = recipe_of(text + CALIBRATE)
    names = {step.name for _, step in read.steps}
    assert names == {name for name, row in METHODS["quantize"].items() if not row.trains} - {"learned_rounding"}
    leaves = _leaves(recipe.compress(read, *model, tokens))
    assert isinstance(leaves[places["quantize"]], InputQuantizedArray)
    for name, (_, bits) in ROUNDING.items():
        leaf = leaves[places[name]]
        weight = leaf.weight if name == "quantize" else leaf
        assert isinstance(weight, QuantizedArray), name
        assert weight.bits == bits, name
    dense = _leaves(model[1])
    assert any((leaves[path] != dense[path]).any() for path in dense if path.endswith("bias"))


def test_learned_rounding_follows_smoothed_weights(model, tokens, recipe_of):
    """Codes move to a neighbour at most: what they are compared with are the weights that were rounded."""
    start = (
        "[[quantize]]\nmethod = 'smooth'\n[[quantize]]\nselect = 'bert/encoder/.*/kernel'\nbits = 4\ngroup_size = 8\n"
    )
    learned = "[[quantize]]\nmethod = 'learned_rounding'\ntogether = 'layer/([0-9]+)/'\nschedule = {steps = 20}\n"
    before, after = (
        _leaves(recipe.compress(recipe_of(text + CALIBRATE), *model, tokens)) for text in (start, start + learned)
    )
    moves = [np.abs(after[path].codes().astype(int) - before[path].codes().astype(int)).max() for path in KERNELS]
    assert max(moves) <= 1


def test_a_recipe_does_what_the_function_does(model, tokens, recipe_of):
    module, params = model
    text = f"[[quantize]]\nmethod = 'hqq'\nselect = '{KERNELS[0]}'\nbits = 3\ngroup_size = 8\nsymmetric = false\n"
    text += "norm = 0.5\n"
    found = _leaves(recipe.compress(recipe_of(text), module, params))[KERNELS[0]]
    spec = quantization.QuantSpec(bits=3, group_size=8, symmetric=False, scale_dtype="bfloat16")
    wanted = quantization.hqq(params, spec, norm=0.5, select=tree.by_path(KERNELS[0]))[0]
    np.testing.assert_array_equal(found.materialize(), _leaves(wanted)[KERNELS[0]].materialize())


def test_gates_may_follow_a_bound_of_the_loss(recipe_of):
    (step,) = recipe_of(
        "[[shrink]]\nmethod = 'hard_concrete'\npenalty = {rule = 'smallest_with', loss_bound = 0.1}\n" + DISTIL
    ).shrink
    assert "penalty" in step.keywords


SHRINKING = {
    "fisher": "sparsity = 0.4\nrounds = 1\n",
    "magnitude": "sparsity = 0.4\n",
    "hard_concrete": "penalty = {rule = 'lagrangian', sparsity = 0.4, warm_up = 0.5}\ndrop_rate = 0.1\n",
}


@pytest.mark.parametrize("method", SHRINKING)
def test_units_are_taken_out(model, tokens, recipe_of, method):
    module, params = model
    text = f"[[shrink]]\nmethod = '{method}'\nselect = 'bert/encoder/.*'\n{SHRINKING[method]}"
    text += CALIBRATE + (DISTIL if METHODS["shrink"][method].trains else "")
    small = recipe.compress(recipe_of(text), module, params, tokens)
    sizes = {
        name: sum(leaf.size for path, leaf in _leaves(found).items() if path.startswith("bert/encoder/"))
        for name, found in (("small", small), ("dense", params))
    }
    assert sizes["small"] <= 0.61 * sizes["dense"]
    shrunk = jc.models.resized(module, small)
    outputs = jax.jit(lambda p, ids: shrunk.apply({"params": p}, ids)["logits"])(small, np.array([tokens.ids[0]]))
    assert np.isfinite(outputs).all()


RUN = {
    "shrink": SHRINKING,
    "prune": [*PRUNING_TRANSFORMS, *ONE_SHOT_PRUNING, "tune_masked"],
    "lowrank": [*LOW_RANK, "compress_factors", "rank_gates", "lora"],
    "quantize": [
        *QUANTIZATION_TRANSFORMS, *ROUNDING, "smooth", "correct_biases", "quantize_inputs", "learned_rounding",
    ],
    "cluster": [*CLUSTERING, "trained_codebooks"],
}  # fmt: skip
"""What the tests above run."""


@pytest.mark.parametrize("stage", METHODS)
def test_every_method_is_run(stage):
    untried = sorted(set(METHODS[stage]) - set(RUN[stage]))
    assert not untried, f"Nothing runs {untried} from a recipe: give their options in the tables of this file."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[prune]]\nmethod = 'movement'\nselect = '.*'\nsparsity = 0.5", r"\[\[prune\]\] 1: `movement` trains"),
        ("[[prune]]\nmethod = 'wand'\nselect = '.*'", "unknown `method` 'wand'; known are gradual, magnitude, wanda"),
        (
            "[[prune]]\nmethod = 'alps'\nselect = '.*'\nevery = 5",
            "unknown option 'every'; known are select, sequential",
        ),
        (
            "[[quantize]]\nmethod = 'gptq'\nselect = '.*'\nbits = 4\nrange_search = 5",
            "`range_search`.* must be a table",
        ),
        ("[[lowrank]]\nmethod = 'svd'\nselect = '.*'\nrank = {rule = 'none'}", "`rank` must be a table with `rule`"),
        ("[[lowrank]]\nmethod = 'svd'\nselect = '.*'\nrank = {rule = 'budget', shar = 1}", "`rank`: unknown option"),
        (
            "[[lowrank]]\nmethod = 'with_residual'\nselect = '.*'\nrank = 2\n"
            "compress = {method = 'reconstruct', bits = 4}",
            "`compress`: `method` 'reconstruct' does not work on factors",
        ),
    ],
)
def test_mistakes_are_named(recipe_of, text, message):
    with pytest.raises(ValueError, match=message):
        recipe_of(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[prune]]\nmethod = 'alps'\nselect = 'K0'\npattern = '2:4'\n", "calibrates: it needs texts"),
        (
            "[[prune]]\nmethod = 'magnitude'\nselect = 'K0'\nsparsity = 0.5\n"
            "[[quantize]]\nmethod = 'hqq'\nselect = 'K0'\nbits = 4\n",
            "would give its zeros values",
        ),
        (
            "[[prune]]\nmethod = 'magnitude'\nselect = 'K0'\nsparsity = 0.5\n"
            "[[quantize]]\nselect = 'K0'\nbits = 4\n" + DISTIL,
            "before the training, in which",
        ),
        ("[[prune]]\nmethod = 'tune_masked'\n" + CALIBRATE, "tunes what earlier"),
        (
            "[[quantize]]\nmethod = 'awq'\nselect = 'K0'\nbits = 4\n"
            "[[quantize]]\nmethod = 'learned_rounding'\ntogether = 'layer/([0-9]+)/'\n" + CALIBRATE,
            "needs the weights as they were",
        ),
    ],
)
def test_contradictions_are_named(model, tokens, recipe_of, text, message):
    given = None if "needs texts" in message else tokens
    with pytest.raises(ValueError, match=message):
        recipe.compress(recipe_of(text.replace("K0", KERNELS[0])), *model, given)


class Notes:
    """A `Progress` that keeps what it is told."""

    def __init__(self):
        self.lines = []

    def task(self, name, total):
        del name, total
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def advance(self, **figures):
        """Nothing to show."""

    def note(self, text):
        self.lines.append(text)
