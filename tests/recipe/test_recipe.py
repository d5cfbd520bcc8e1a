"""Recipes read from TOML: what they mean, and every way they can be wrong."""

import dataclasses
import itertools
import re

import pytest
from export_models import CONFIGS

from jaxcompress import recipe
from jaxcompress._src.models.families import family_of
from jaxcompress._src.recipe.calibrate import Calibration
from jaxcompress._src.recipe.compress import without_distillation
from jaxcompress._src.recipe.methods import METHODS
from jaxcompress._src.recipe.recipe import Saving, packaged_recipes
from jaxcompress._src.recipe.steps import read_step, step_options
from jaxcompress.clustering import CodebookSpec
from jaxcompress.pruning import n_of_m, unstructured


def _read(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return recipe.read_recipe(path)


def test_the_recipes_of_the_library_can_be_read():
    assert {"deep-compression", "demo", "demo-full", "int4"} <= set(packaged_recipes())
    for name in packaged_recipes():
        read = recipe.read_recipe(name)
        assert (read.save.storage, bool(read.cluster)) == (
            ("entropy", True) if name == "deep-compression" else ("orbax", False)
        )
        assert read.steps


@pytest.mark.parametrize("model", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("name", ["2of4-alps", "int3-reconstruct", "int4", "int4-reconstruct", "int8-inputs"])
def test_recipes_for_any_family_select_its_layers_and_embeddings(name, model):
    patterns = [step.select or "" for _, step in recipe.read_recipe(name).steps]
    paths = family_of(CONFIGS[model]).parameters(CONFIGS[model])
    assert all(any(re.fullmatch(pattern, path) for path in paths) for pattern in patterns)
    layers = [path for path in paths if re.search(r"/(layers|layer|h)/.*/kernel", path)]
    assert layers
    assert all(any(re.fullmatch(pattern, path) for pattern in patterns) for path in layers)


def test_options_reach_their_steps(tmp_path):
    read = _read(
        tmp_path,
        """
        [[prune]]
        select = '.*kernel'
        sparsity = 0.5
        pattern = "2:4"
        [[quantize]]
        select = '.*kernel'
        bits = 3
        group_size = 16
        scale_dtype = "float32"
        [distil]
        epochs = 2
        learning_rate = 1
        widths = [8, 16]
        soft_targets = 0.5
        """,
    )
    assert read.prune[0].keywords["pattern"] == n_of_m(2, 4)
    spec = read.quantize[0].keywords["spec"]
    assert (spec.bits, spec.scale_dtype) == (3, "float32")
    assert read.distil.widths == (8, 16)
    assert read.distil.learning_rate == 1.0
    assert (
        read_step("prune", {"select": ".*", "sparsity": 0.1, "pattern": "unstructured"}).keywords["pattern"]
        == unstructured()
    )
    assert without_distillation(read).distil is None


def test_options_of_shared_values_reach_their_step(tmp_path):
    read = _read(
        tmp_path,
        """
        [[cluster]]
        select = '.*kernel'
        values = 8
        per = "output"
        rate = 0.01
        dtype = "float32"
        zero = false
        until = 0.5
        [distil_shared]
        epochs = 1
        learning_rate = 0.01
        soft_targets = 1
        [save]
        storage = "entropy"
        """,
    )
    spec = read.cluster[0].keywords["spec"]
    assert spec == CodebookSpec(values=8, per="output", rate=0.01, dtype="float32", zero=False)
    assert read.cluster[0].keywords["until"].at(10) == 5
    assert (read.cluster[0].frozen, read.save.storage) == (False, "entropy")
    assert read.distils
    bare = without_distillation(read)
    assert (bare.distils, bare.cluster, bare.save) == (False, read.cluster, read.save)


CLUSTER = "[[cluster]]\nselect = '.*'\nvalues = 4\n"
QUANTIZE = "[[quantize]]\nselect = '.*'\nbits = 4\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"needs at least one \[\[shrink\]\], .*, \[\[quantize\]\] or \[\[cluster\]\]"),
        ("[[prune]", "recipe.toml"),
        (
            "[[prun]]\nselect = '.*'",
            "unknown table 'prun'; known are shrink, prune, lowrank, quantize, cluster, calibrate, distil",
        ),
        ("[prune]\nselect = '.*'", r"`prune` is a list of tables: write \[\[prune\]\]"),
        (
            "[[prune]]\nselect = '.*'\nsparsty = 0.5",
            r"\[\[prune\]\] 1: unknown option 'sparsty'; known are select, frozen, sparsity, begin",
        ),
        ("[[prune]]\nselect = '.*'", r"\[\[prune\]\] 1: the option 'sparsity' is needed"),
        ("[[prune]]\nselect = '.*'\nsparsity = 1.5", r"`sparsity` must be in \[0, 1\], got 1.5"),
        ("[[prune]]\nselect = '.*'\nsparsity = '0.5'", "`sparsity` must be of type float, found '0.5'"),
        ("[[prune]]\nselect = '.*'\nsparsity = true", "`sparsity` must be of type float, found True"),
        ("[[prune]]\nselect = '.*'\nsparsity = 0.5\npattern = '2-4'", "`pattern` must be unstructured or N:M"),
        ("[[prune]]\nselect = '.*'\nsparsity = 0.5\npattern = '5:4'", "n=5, m=4"),
        (
            "[[prune]]\nselect = '.*'\nsparsity = 0.9\npattern = '2:4'",
            r"\[\[prune\]\] 1: `pattern` 2:4 allows a `sparsity` of at most 0.5, got 0.9",
        ),
        ("[[prune]]\nselect = '.*'\nsparsity = 0.5\nbegin = 0.5\nend = 0.5", "0 <= begin < end <= 1"),
        (
            "[[prune]]\nselect = '.*'\nsparsity = 0.5\nscope = 'all'",
            "`scope` must be 'leaf' or 'global' or 'row', found 'all'",
        ),
        ("[[prune]]\nselect = '.*'\nsparsity = 0.5\nevery = 0", "`every` must be at least 1"),
        ("[[quantize]]\nselect = '.*'\nbits = 9", r"\[\[quantize\]\] 1: `bits` must be an integer in \[1, 8\], got 9"),
        ("[[quantize]]\nselect = '.*'\nbits = 4.5", "`bits` must be of type int, found 4.5"),
        ("quantize = [1]", r"\[\[quantize\]\] 1 must be a table of options, found 1"),
        ("[[cluster]]\nselect = '.*'", r"\[\[cluster\]\] 1: the option 'values' is needed"),
        ("[[cluster]]\nselect = '.*'\nvalues = 1", r"\[\[cluster\]\] 1: `values` must be in \[2, 256\], got 1"),
        (f"{CLUSTER}rate = -1", "`rate` must be at least 0 and finite"),
        (f"{CLUSTER}per = 'row'", "`per` must be 'leaf' or 'output', found 'row'"),
        (f"{CLUSTER}per = 1", "`per` must be 'leaf' or 'output', found 1"),
        (f"{CLUSTER}dtype = 'int8'", "`dtype` must be 'float32' or 'bfloat16', found 'int8'"),
        (f"{CLUSTER}until = 2", r"`until` is a share of the training and must be in \[0, 1\], got 2"),
        (f"{CLUSTER}frozen = true\nuntil = 0.5", "`until` must be left out if `frozen` is true"),
        (f"{CLUSTER}every = 0", "`every` must be at least 1"),
        (f"{CLUSTER}zero = false\nstore = 'sparse'", "`store` must be 'dense', or 'sparse' if"),
        (f"{CLUSTER}frozen = true\nstore = 'sparse'", "`store` must be left out if `frozen` is true"),
        (
            f"{CLUSTER}frozen = true\n[distil_shared]\nepochs = 1\nlearning_rate = 1\nsoft_targets = 1",
            r"\[distil_shared\] trains shared values: it needs a \[\[cluster\]\] step",
        ),
        (f"{QUANTIZE}[save]\nstorage = 'zip'", r"\[save\]: `storage` must be 'orbax' or 'entropy', found 'zip'"),
        (f"{QUANTIZE}[distil]\nepochs = 1\nlearning_rate = 0.1", "At least one loss needs a positive weight"),
        (f"{QUANTIZE}[distil]\nepochs = 0\nlearning_rate = 0.1\nsoft_targets = 1", "`epochs` must be at least 1"),
        (
            f"{QUANTIZE}[distil]\nepochs = 1\nlearning_rate = 1\nsoft_targets = 1\nbatch_size = 9\nmicro_batches = 2",
            r"\[distil\]: `micro_batches` must divide `batch_size`, 9, got 2",
        ),
        (f"{QUANTIZE}[distil]\nepochs = 1\nlearning_rate = 1\nsoft_targets = 1\nema = 1", r"`ema` must be in \[0, 1\)"),
        (
            f"{QUANTIZE}[distil]\nepochs = 1\nlearning_rate = 1\nsoft_targets = 1\nremat = 'all'",
            "`remat` must be 'dots_saveable' or .*, found 'all'",
        ),
        (f"{QUANTIZE}[distil]\nepochs = 1\nlearning_rate = -1\nsoft_targets = 1", "`learning_rate` must be positive"),
        (
            f"{QUANTIZE}[distil]\nepochs = 1\nlearning_rate = 1\nsoft_targets = 1\ntemperature = 0",
            r"\[distil\]: `temperature` must be positive, got 0",
        ),
        (
            f"{QUANTIZE}[distil]\nepochs = 1\nlearning_rate = 1\nsoft_targets = 1\nweight_decay = -1",
            r"\[distil\]: `weight_decay` must not be negative, got -1",
        ),
        (
            f"{QUANTIZE}[distil]\nepochs = 1\nlearning_rate = 1\nsoft_targets = 1\nwidths = [32, 16]",
            "`widths` must be positive and ascending",
        ),
        (
            f"{QUANTIZE}[distil]\nepochs = 1\nlearning_rate = 1\nsoft_targets = 1\nwarmup = 1",
            r"`warmup` is a share of the steps and must be in \[0, 1\)",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        _read(tmp_path, text)
    assert "recipe.toml" in str(caught.value)


def test_a_recipe_that_does_not_exist_lists_those_that_do():
    with pytest.raises(FileNotFoundError, match="recipes of the library: 2of4-alps, deep-compression, demo"):
        recipe.read_recipe("int5")


ODD = [
    "true", "0", "-1", "5", "99999999999999999999", "1.5", "-0.5", "nan", "inf", "-inf", "1e400", "1e-320", "''", "'x'",
    "'.*'", "[]", "[5]", "[5, 4]", "[-1]", "['x']", "[[1]]", "[nan]", "{}", "{a = 1}", "1979-05-27", "07:32:00",
]  # fmt: skip
STEPS = {
    "prune": ("[[prune]]", {"select": "'.*'", "sparsity": "0.5"}, "gradual", ""),
    "quantize": ("[[quantize]]", {"select": "'.*'", "bits": "4"}, "quantization_aware", ""),
    "cluster": ("[[cluster]]", {"select": "'.*'", "values": "4"}, "trained_codebooks", ""),
    "calibrate": ("[calibrate]", {}, Calibration, QUANTIZE),
    "distil": ("[distil]", {"epochs": "1", "learning_rate": "0.1", "pooled": "1"}, recipe.Training, QUANTIZE),
    "save": ("[save]", {}, Saving, QUANTIZE),
}


@pytest.mark.parametrize("step", STEPS)
def test_any_value_of_any_option_is_read_or_named(tmp_path, step):
    """Integers may stand for floats; nothing else stands for another type, and the option is in the message."""
    header, needed, kind, before = STEPS[step]
    refused = []
    if isinstance(kind, str):
        method = METHODS[step][kind]
        fields = list(step_options(method))
    else:
        fields = [field.name for field in dataclasses.fields(kind)]
    for option, value in itertools.product(fields, ODD):
        options = "".join(f"{name} = {given}\n" for name, given in (needed | {option: value}).items())
        try:
            _read(tmp_path, f"{before}{header}\n{options}")
        except ValueError as err:
            refused.append((option, value, str(err)))
    assert len(refused) > 0.6 * len(ODD) * len(fields)
    for option, value, message in refused:
        assert header in message, (option, value)
        assert option in message, (option, value, message)
