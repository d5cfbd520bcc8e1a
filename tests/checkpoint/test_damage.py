"""Damaged and foreign checkpoints: one clear error, never wrong numbers."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxcompress._src.checkpoint.manifest_file import checksum
from jaxcompress._src.checkpoint.read import read_manifest
from jaxcompress.checkpoint import CheckpointError, restore, save


@pytest.fixture(scope="module")
def original(tmp_path_factory, compressed):
    path = tmp_path_factory.mktemp("original") / "c"
    save(path, {"layer": {"kernel": compressed["int4 2:4"], "bias": jnp.arange(8.0)}, "key": jax.random.key(0), "n": 2})
    return path


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "c")


def _edit(path, change):
    """A deliberate edit, checksum included: what contradicts itself must be seen without it."""
    content = json.loads((path / "manifest.json").read_text())
    change(content)
    if isinstance(content.get("checksum"), str):
        content["checksum"] = checksum(content)
    (path / "manifest.json").write_text(json.dumps(content))


def _value(content, name):
    names = {"kernel": 0, "bias": 1, "key": 2, "n": 3}
    return content["leaves"][names[name]]["value"]


def _fails(path, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        restore(path)
    assert repr(str(path)) in str(caught.value) or str(path) in str(caught.value)


def test_every_missing_or_cut_file_is_named(original, tmp_path):
    files = sorted(file.relative_to(original) for file in original.rglob("*") if file.is_file())
    assert len(files) > 5
    for at, file in enumerate(files):
        missing = shutil.copytree(original, tmp_path / f"missing{at}")
        (missing / file).unlink()
        _fails(missing, re.escape(str(file)))
        cut = shutil.copytree(original, tmp_path / f"cut{at}")
        (cut / file).write_bytes((cut / file).read_bytes()[: (cut / file).stat().st_size // 2])
        _fails(cut, re.escape(str(file)))


def test_a_missing_folder_of_arrays(copy):
    shutil.rmtree(copy / read_manifest(copy).arrays)
    _fails(copy, r"damaged: 'arrays-.*/.*' is missing, \d+ bytes were written")


def test_every_cut_of_the_manifest(copy):
    text = (copy / "manifest.json").read_text()
    for length in range(0, len(text) - 1, 97):
        (copy / "manifest.json").write_text(text[:length])
        _fails(copy, "not valid JSON")


@pytest.mark.parametrize(
    "content", ["[]", "3", "{}", '{"format_version": "1"}', '{"format_version": true}', "[" * 10**5]
)
def test_json_of_something_else(copy, content):
    (copy / "manifest.json").write_text(content)
    _fails(copy, "manifest")


def test_every_missing_field_of_the_manifest(original, tmp_path):
    content = json.loads((original / "manifest.json").read_text())
    for name in content:
        path = shutil.copytree(original, tmp_path / name)
        _edit(path, lambda found, name=name: found.pop(name))
        _fails(path, f"`{name}`")
        _edit(path, lambda found, name=name: found.update({name: 0.5}))
        _fails(path, f"`{name}`")


def test_a_newer_format(copy):
    _edit(copy, lambda content: content.update(format_version=4, versions={"jaxcompress": "9.1"}, new={}))
    _fails(copy, r"format version 4, written by jaxcompress 9\.1; this version reads up to 3\. Upgrade")
    with pytest.raises(CheckpointError, match="format version 4"):
        read_manifest(copy)


def test_foreign_directories(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", {"a": jnp.ones(2)})
    _fails(tmp_path / "orbax", r"is an Orbax checkpoint without a jaxcompress manifest\.json")
    (tmp_path / "other").mkdir()
    _fails(tmp_path / "other", r"has no manifest\.json.* It holds nothing")
    (tmp_path / "other" / "model.safetensors").write_text("x")
    _fails(tmp_path / "other", r"It holds model\.safetensors")
    _fails(tmp_path / "other" / "model.safetensors", "is a file; a checkpoint is a directory")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("kernel", {"kind": "FractalArray"}, r"leaf 'layer/kernel': class 'FractalArray' is unknown.*QuantizedArray"),
        ("kernel", {"kind": "BitmaskSparseArray"}, r"leaf 'layer/kernel': BitmaskSparseArray has parts"),
        ("kernel", {"shape": [8, 16]}, r"leaf 'layer/kernel': the parts .* float32\[16, 8\].* says float32\[8, 16\]"),
        ("kernel", {"dtype": "bfloat16"}, r"leaf 'layer/kernel': the parts .* says bfloat16\[16, 8\]"),
        ("kernel", {"static": {"dtype": "float99", "levels": None}}, "'float99' is not the name of a dtype"),
        ("kernel", {"static": {"dtype": "float32", "levels": [1.0, "a"]}}, "leaf 'layer/kernel': 'a' is of type str"),
        ("kernel", {"static": {"dtype": "float32"}}, r"found .* and \['dtype'\]"),
        ("bias", {"shape": [4, 2]}, r"Array 'leaf_00001' .* is float32\[8\]; the manifest says float32\[4, 2\]"),
        ("bias", {"dtype": "int32"}, r"Array 'leaf_00001' .* is float32\[8\]; the manifest says int32\[8\]"),
        ("bias", {"dtype": "int4"}, r"leaf 'layer/bias': array 'leaf_00001' needs .* found 'int4'"),
        ("bias", {"dtype": "object"}, "leaf 'layer/bias': array 'leaf_00001' needs"),
        ("bias", {"shape": [-8]}, r"leaf 'layer/bias': `shape` is a list of sizes, found \[-8\]"),
        ("bias", {"array": "leaf_9"}, r"missing leaf_9; not in the manifest leaf_00001"),
        ("bias", {"array": "leaf_00000.scale"}, "two arrays have the same name"),
        ("bias", {"kind": "jax.Matrix", "array": None}, "leaf 'layer/bias': `array` should be of type str"),
        ("key", {"static": {"impl": "dice"}}, "leaf 'key': random keys of the implementation 'dice'"),
        ("key", {"static": {"impl": "rbg"}}, "leaf 'key': random keys of the implementation 'rbg'"),
        ("key", {"shape": [2]}, r"leaf 'key': key data of shape \(2,\) make keys of shape \(\), not \(2,\)"),
        ("n", {"static": {"value": "two"}}, "leaf 'n': invalid literal"),
        ("n", {"dtype": "str"}, "leaf 'n': a Python number has"),
    ],
)
def test_leaves_that_contradict_themselves(copy, name, change, message):
    _edit(copy, lambda content: _value(content, name).update(change))
    _fails(copy, message)


def test_wrong_bits_of_packed_codes(copy):
    def change(content):
        _value(content, "kernel")["parts"]["data"]["parts"]["values"]["static"]["bits"] = 2

    _edit(copy, change)
    _fails(copy, r"leaf 'layer/kernel': .* codes of 2 bits fill \d+ bytes")


def test_structures_that_contradict_the_leaves(copy):
    _edit(copy, lambda content: content["leaves"].pop())
    _fails(copy, "`structure` has 4 leaves and `leaves` has 3")
    _edit(copy, lambda content: content["structure"]["children"].pop())
    np.testing.assert_array_equal(restore(copy)[0]["layer"]["bias"], np.arange(8))
    _edit(copy, lambda content: content["structure"]["children"][0].__setitem__(1, "renamed"))
    _fails(copy, "they must be the same")
    _edit(copy, lambda content: content["structure"]["children"][0].__setitem__(0, "MagicKey"))
    _fails(copy, "a key is a pair of one of DictKey")


def test_a_container_of_the_future(copy):
    _edit(copy, lambda content: content["structure"].update(kind="PersistentMap"))
    _fails(copy, "'.' is a container of the unknown kind 'PersistentMap'")


def test_any_changed_byte_of_the_arrays_is_an_error_or_harmless(original, tmp_path):
    """A byte that rots without a change of size: an error, or (unused bytes) the right numbers; never other numbers."""
    expected = jax.tree.leaves(restore(original)[0])
    (data,) = sorted((original / read_manifest(original).arrays / "d").iterdir())
    size = data.stat().st_size
    for at in range(0, size, max(size // 25, 1)):
        path = shutil.copytree(original, tmp_path / f"{at}")
        content = bytearray((path / data.relative_to(original)).read_bytes())
        content[at] ^= 0x10
        (path / data.relative_to(original)).write_bytes(content)
        try:
            found = jax.tree.leaves(restore(path)[0])
        except CheckpointError:
            continue
        for new, old in zip(found, expected, strict=True):
            np.testing.assert_array_equal(
                jax.random.key_data(new) if _is_key(new) else new, jax.random.key_data(old) if _is_key(old) else old
            )


def _is_key(leaf):
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _places(content, path=()):
    """Every value of a JSON document that is no container, and every container, by its path."""
    if path:
        yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


def _changed(value):
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value + 1
    return value + "x" if isinstance(value, str) else type(value)()


def test_every_change_of_the_manifest_is_seen(original, tmp_path, compressed):
    """A flipped level, an edited scale's shape, another config, an emptied list of files: whatever it is."""
    path = tmp_path / "c"
    tree = {"kernel": compressed["levels"], "bias": jnp.arange(8.0), "number": 0.5, 3: (jax.random.key(0), None)}
    save(path, tree, config={"deep": {"rate": 0.1, "names": ["a"], "none": None}}, metadata={"epoch": 3})
    text = (path / "manifest.json").read_text()
    places = list(_places(json.loads(text)))
    assert len(places) > 150
    for place in places:
        for remove in (False, True):
            content = json.loads(text)
            parent = content
            for key in place[:-1]:
                parent = parent[key]
            if remove:
                del parent[place[-1]]
            elif (new := _changed(parent[place[-1]])) != parent[place[-1]]:
                parent[place[-1]] = new
            else:
                continue
            (path / "manifest.json").write_text(json.dumps(content))
            with pytest.raises(CheckpointError, match=r"manifest|format version"):
                read_manifest(path)
    # The order of names and the layout of the text are no part of what it says.
    (path / "manifest.json").write_text(json.dumps(json.loads(text), sort_keys=True))
    assert read_manifest(path).config == {"deep": {"rate": 0.1, "names": ["a"], "none": None}}


def test_old_manifests_cannot_lose_their_files(tmp_path):
    """Formats 1 and 2 have no checksum, but what is written there must be whole."""
    path = Path(shutil.copytree(Path(__file__).parent / "golden" / "format_1", tmp_path / "c"))
    text = (path / "manifest.json").read_text()
    for change, message in (
        (lambda content: content.update(files={}), "`files` is empty, but there are arrays"),
        (lambda content: content["files"].update({"../x": {"size": 1, "crc32": "0"}}), r"'\.\./x', which is not in"),
        (lambda content: content["files"].update({"arrays/../../x": {"size": 1, "crc32": "0"}}), "which is not in"),
    ):
        content = json.loads(text)
        change(content)
        (path / "manifest.json").write_text(json.dumps(content))
        _fails(path, message)


def test_arrays_of_another_save_of_the_same_tree(original, tmp_path):
    """The same shapes and names, other numbers: the manifest knows its own."""
    tree = {"a": jnp.zeros(3)}
    save(tmp_path / "c", tree)
    save(tmp_path / "d", jax.tree.map(lambda x: x + 1, tree))
    shutil.rmtree(tmp_path / "c" / read_manifest(tmp_path / "c").arrays)
    shutil.copytree(
        tmp_path / "d" / read_manifest(tmp_path / "d").arrays, tmp_path / "c" / read_manifest(tmp_path / "c").arrays
    )
    _fails(tmp_path / "c", "SHA-256|missing")
