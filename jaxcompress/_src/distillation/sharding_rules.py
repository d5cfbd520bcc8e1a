"""Parameters onto a mesh, by rules on their paths."""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcompress._src.arrays.sharding import component_shardings, ways
from jaxcompress._src.distillation.placement import put
from jaxcompress._src.tree.maps import leaf_paths, map_with_path
from jaxcompress._src.types import Params, is_compressed

Rules = Sequence[tuple[str, PartitionSpec]]
"""Regular expressions over whole paths of leaves, with the mesh axes of each array axis."""


def shard_by_rules(params: Params, mesh: Mesh, rules: Rules) -> Params:
    """Puts every leaf on a mesh, as the first rule says whose pattern matches its path.

    Everything that `make_train_step` holds for a leaf (moments, masters, averages, masks, scores, factors) then lies
    where the leaf does: with the mesh axes `data` and `tensor`, `PartitionSpec("data")` is fully sharded data
    parallelism, `PartitionSpec(None, "tensor")` cuts the outputs of a kernel (in, out), and
    `PartitionSpec("data", "tensor")` does both.

    Args:
        params: the tree; of compressed leaves the parts are cut as `arrays.component_shardings` says. Scalars are
            replicated, with or without a rule.
        mesh: with Auto or Explicit axes.
        rules: (pattern, spec), matched in order against full paths (`re.fullmatch`); end with `(".*",
            PartitionSpec())` to replicate what is left.

    Returns:
        The tree, on the mesh; nothing is moved before all rules have been checked.

    Raises:
        ValueError: a leaf that no rule matches, a rule that matches no leaf, a spec with too many axes or with axes
            that the mesh lacks, or an axis that its devices do not divide. Names the leaf and the rule.

    Example:
        >>> import jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> params = {"dense": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}
        >>> rules = [(".*/kernel", PartitionSpec("data")), (".*", PartitionSpec())]
        >>> shard_by_rules(params, mesh, rules)["dense"]["kernel"].sharding.spec
        P('data',)
    """
    patterns = [(re.compile(pattern), spec) for pattern, spec in rules]
    paths = leaf_paths(params)
    for pattern, _ in patterns:
        if not any(map(pattern.fullmatch, paths)):
            raise ValueError(f"The rule {pattern.pattern!r} matches no leaf. The leaves are:{_listed(paths)}")
    shardings: dict[str, Any] = {}
    unmatched: list[str] = []

    def plan(path: str, leaf: Any) -> None:
        rule = next(((pattern, spec) for pattern, spec in patterns if pattern.fullmatch(path)), None)
        if not leaf.shape:
            shardings[path] = NamedSharding(mesh, PartitionSpec())
        elif rule is None:
            unmatched.append(path)
        else:
            shardings[path] = _sharding(path, leaf, mesh, rule[0].pattern, rule[1])

    map_with_path(plan, params)
    if unmatched:
        raise ValueError(f"No rule matches the leaves:{_listed(unmatched)}")
    return map_with_path(lambda path, leaf: jax.tree.map(put, leaf, shardings[path]), params)


def _sharding(path: str, leaf: Any, mesh: Mesh, pattern: str, spec: PartitionSpec) -> Any:
    shown = f"The rule {pattern!r}, {spec}, for leaf {path!r} of shape {tuple(leaf.shape)}"
    names = [name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry)]
    if unknown := [name for name in names if name not in mesh.shape]:
        raise ValueError(f"{shown}: the mesh has no axis {unknown[0]!r}; it has {dict(mesh.shape)}.")
    if len(spec) > len(leaf.shape):
        raise ValueError(f"{shown}: the spec has {len(spec)} axes.")
    sharding = NamedSharding(mesh, spec)
    for axis, (size, entry) in enumerate(zip(leaf.shape, spec, strict=False)):
        if size % ways(sharding, entry):
            raise ValueError(f"{shown}: its axis {axis} cannot be cut into {ways(sharding, entry)} equal shares.")
    return component_shardings(leaf, sharding) if is_compressed(leaf) else sharding


def _listed(paths: Sequence[str]) -> str:
    return "".join(f"\n  {path}" for path in paths)
