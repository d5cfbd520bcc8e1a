"""StableHLO: one program for several platforms, its parameters beside it, loaded by JAX alone."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.arrays.protocol import describe_leaf
from jaxcompress._src.execution.execute import execute
from jaxcompress._src.export.files import new_directory
from jaxcompress._src.meshes import to_host
from jaxcompress._src.trace.traced import split_arrays
from jaxcompress._src.tree.maps import leaves_with_paths
from jaxcompress._src.tree.paths import path_string
from jaxcompress._src.types import Params, is_compressed

_PROGRAM, _PARAMETERS, _DESCRIPTION = "model.stablehlo", "params.safetensors", "export.json"
_VERSION = 1

# What safetensors reads back as NumPy arrays.
_PLAIN = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
_PLAIN += ("float16", "bfloat16", "float32", "float64", "complex64")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StablehloInfo:
    """What `save_stablehlo` wrote.

    Attributes:
        directory: with the three files.
        nbytes: of all of them.
        program_nbytes: of the program.
        platforms: that it was lowered for.
        calling_convention: its version, which decides which releases of JAX can call it.
        leaves: by path, the form in which each compressed leaf was written, such as `int4 g32`.
    """

    directory: Path
    nbytes: int
    program_nbytes: int
    platforms: tuple[str, ...]
    calling_convention: int
    leaves: Mapping[str, str]


def save_stablehlo(
    directory: str | os.PathLike[str],
    apply: Callable[..., Any],
    params: Params,
    *inputs: Any,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    overwrite: bool = False,
) -> StablehloInfo:
    """Writes `execute(apply, kernels=())` as a StableHLO program, and the parameters beside it, in their stored forms.

    The directory holds `model.stablehlo` (a serialized `jax.export.Exported` of `(arrays, *inputs)`),
    `params.safetensors` (the `arrays`: a flat dict) and `export.json` (versions, platforms, shapes, leaves). It loads
    without this library::

        import jax, json, pathlib
        from safetensors.numpy import load_file

        directory = pathlib.Path("model")
        exported = jax.export.deserialize(bytearray((directory / "model.stablehlo").read_bytes()))
        arrays = load_file(directory / "params.safetensors")
        outputs = jax.jit(exported.call)(arrays, *inputs)

    Outputs are those of `jax.jit(execute(apply, kernels=()))`, bit for bit where shapes are not symbolic. JAX promises
    to read a program for six months after it was written.

    Args:
        directory: to write, whole or not at all.
        apply: `(params, *inputs) -> outputs`, pure. Inputs and outputs are arrays in dicts, lists and tuples.
        params: with or without compressed leaves; whatever is no array in it is static.
        *inputs: arrays or `jax.ShapeDtypeStruct`; `jax.export.symbolic_shape("batch, 64")` gives shapes that hold for
            every batch.
        platforms: to lower for: `cpu`, `cuda`, `rocm`, `tpu`.
        overwrite: whether a directory that exists is replaced.

    Raises:
        FileExistsError: there is a directory, and `overwrite` is not set.
        TypeError: an input or a parameter cannot be written; names it.

    Example:
        >>> import tempfile
        >>> from jaxcompress.quantization import QuantSpec, quantize
        >>> params, _ = quantize({"w": jnp.ones((64, 8))}, QuantSpec(bits=4, group_size=32))
        >>> directory = Path(tempfile.mkdtemp()) / "model"
        >>> batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 64"), jnp.float32)
        >>> info = save_stablehlo(directory, lambda p, x: x @ p["w"], params, batch)
        >>> info.leaves
        {'w': 'int4 g32'}
        >>> load_stablehlo(directory)(jnp.ones((3, 64))).shape
        (3, 8)
    """
    abstract_inputs = jax.tree_util.tree_map_with_path(_abstract_input, inputs)
    with new_directory(Path(directory), overwrite=overwrite, marker=_DESCRIPTION) as place:
        arrays, rebuild = _flat(params)

        def program(stored: dict[str, jax.Array], *inputs: Any) -> Any:
            return execute(apply, kernels=())(rebuild(stored), *inputs)

        shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
        exported = jax.export.export(jax.jit(program), platforms=tuple(platforms))(shapes, *abstract_inputs)
        content = bytes(exported.serialize())
        compressed = [(path, leaf) for path, leaf in leaves_with_paths(params) if is_compressed(leaf)]
        leaves = {path: describe_leaf(leaf) for path, leaf in compressed}
        (place / _PROGRAM).write_bytes(content)
        _save_arrays(place / _PARAMETERS, arrays)
        (place / _DESCRIPTION).write_text(json.dumps(_description(exported, leaves), indent=2) + "\n", "utf-8")
        nbytes = sum(path.stat().st_size for path in place.iterdir())
    return StablehloInfo(
        directory=Path(directory),
        nbytes=nbytes,
        program_nbytes=len(content),
        platforms=exported.platforms,
        calling_convention=exported.calling_convention_version,
        leaves=leaves,
    )


def load_stablehlo(directory: str | os.PathLike[str]) -> Callable[..., Any]:
    """What `save_stablehlo` wrote, as a jitted function of the inputs.

    Args:
        directory: as written.

    Returns:
        `(*inputs) -> outputs`: a `functools.partial`, whose `args[0]` are the parameters as a flat dict of arrays.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the directory was written by a later version, or not for the platform of this process; a file is
            damaged (names it).
    """
    from safetensors.numpy import load_file

    directory = Path(directory)
    version = _read(directory / _DESCRIPTION, lambda path: int(json.loads(path.read_text("utf-8"))["version"]))
    if version > _VERSION:
        raise ValueError(f"{str(directory)!r} has version {version}; this library reads {_VERSION}.")
    exported = _read(directory / _PROGRAM, lambda path: jax.export.deserialize(bytearray(path.read_bytes())))
    return functools.partial(jax.jit(exported.call), _read(directory / _PARAMETERS, load_file))


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except OSError:
        raise
    except Exception as err:  # whatever the parsers make of other bytes
        raise ValueError(f"{str(path)!r} is damaged, or not what `save_stablehlo` writes: {err}") from err


def _abstract_input(keys: tuple[Any, ...], value: Any) -> jax.ShapeDtypeStruct:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(f"Input {path_string(keys)} is {value!r}, not an array; close over flags: `lambda p, x: ...`.")
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def _flat(params: Params) -> tuple[dict[str, np.ndarray], Callable[[Mapping[str, jax.Array]], Params]]:
    """The stored parts by name, as arrays that safetensors holds, and the way back from those."""
    parts, static = split_arrays(params, is_leaf=lambda _: False)
    names = _names(params)
    names = [names[number] for number in static.numbers]
    stored = {name: _to_stored(name, part) for name, part in zip(names, parts, strict=True)}
    dtypes = [part.dtype for part in parts]

    def rebuild(arrays: Mapping[str, jax.Array]) -> Params:
        return static.filled([_from_stored(arrays[name], dtype) for name, dtype in zip(names, dtypes, strict=True)])

    return stored, rebuild


def _names(params: Params) -> list[str]:
    """Of all parts, in order: the path of the leaf, then `.data`, `.scale` and so on."""
    names: list[str] = []
    keyed, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_compressed)
    for keys, leaf in keyed:
        for inner, _ in jax.tree_util.tree_flatten_with_path(leaf)[0]:
            parts = path_string(inner).replace("/", ".")
            name = f"{path_string(keys)}.{parts}" if inner else path_string(keys)
            # Different keys may read the same: {"a": {"b": ...}} and {"a/b": ...}.
            while name in names:
                name = f"{name}~{len(names)}"
            names.append(name)
    return names


def _to_stored(name: str, part: Any) -> np.ndarray:
    if jnp.issubdtype(part.dtype, jax.dtypes.prng_key):
        raise TypeError(f"Parameter {name!r} is a random key; close over it, or pass it as an input (`key_data`).")
    array = np.asarray(to_host(part))
    if array.dtype.name in _PLAIN:
        return array
    return array.astype(np.int8) if "int" in array.dtype.name else array.view(np.uint8)


def _from_stored(array: jax.Array, dtype: Any) -> jax.Array:
    if array.dtype == dtype:
        return array
    # Integers below 8 bits have no place at the boundary, and floats of 8 bits none in the file.
    return array.astype(dtype) if "int" in dtype.name else jax.lax.bitcast_convert_type(array, dtype)


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file(dict(arrays), path)


def _description(exported: jax.export.Exported, leaves: Mapping[str, str]) -> dict[str, Any]:
    from jaxcompress import __version__

    def written(avals: Sequence[Any]) -> list[str]:
        return [f"{aval.dtype}[{','.join(map(str, aval.shape))}]" for aval in avals]

    # Among the flat arguments, the parameters come first.
    parameters = exported.in_tree.children()[0].children()[0].num_leaves
    return {
        "version": _VERSION,
        "jaxcompress": __version__,
        "jax": jax.__version__,
        "calling_convention_version": exported.calling_convention_version,
        "platforms": list(exported.platforms),
        "inputs": written(exported.in_avals[parameters:]),
        "outputs": written(exported.out_avals),
        "compressed_leaves": dict(leaves),
    }
