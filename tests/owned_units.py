"""Comparing groups of units, whatever they are called and however their slices say what they own."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.units.group import index_owners, leaf_shapes
from jaxcompress._src.units.shrink import mask_units
from jaxcompress.structured import UnitSlices, shrink


def owned(group, params, *, gated=False):
    """(path, axis) -> the unit of every index, however the slices say it."""
    shapes, owners = leaf_shapes(params), {}
    for part in group.gated if gated else group.slices:
        owner = index_owners(part, group.count, shapes[part.path][part.axis])
        all_owners = owners.setdefault((part.path, part.axis), np.full_like(owner, -1))
        assert (all_owners[owner >= 0] == -1).all()
        all_owners[owner >= 0] = owner[owner >= 0]
    return frozenset((place, tuple(each.tolist())) for place, each in owners.items())


def assert_same(groups, expected, params, *, gated=True):
    for only in {False, gated}:
        found, wanted = ({owned(each, params, gated=only) for each in side} for side in (groups, expected))
        assert found == wanted


def draw(shapes, seed=0):
    """A tree of random arrays; variances are positive, kernels keep the size of what goes through them."""
    rng = np.random.default_rng(seed)

    def leaf(path, like):
        array = rng.normal(size=like.shape) / max(np.prod(like.shape[:-1]), 1) ** (0.5 if len(like.shape) > 1 else 0)
        positive = "'var'" in jax.tree_util.keystr(path)
        return jnp.asarray(np.abs(array) + 0.5 if positive else array, like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def random_keep(groups, seed=1):
    """Some units of each group stay, and some go; where there is one, it goes."""
    rng, keep = np.random.default_rng(seed), {}
    for group in groups:
        keep[group.name] = np.arange(group.count) < (round(0.6 * group.count) if group.count > 1 else 0)
        rng.shuffle(keep[group.name])
    return keep


def assert_masked_equals_shrunk(apply, resized, params, groups, *inputs):
    """Of a compiled function, and of one that `resized` makes for what is left, which is returned."""
    keep = random_keep(groups)
    small = shrink(params, groups, keep)
    masked, whole = apply(mask_units(params, groups, keep), *inputs), apply(params, *inputs)
    np.testing.assert_allclose(resized(small)(small, *inputs), masked, rtol=0, atol=1e-5)
    assert np.abs(np.asarray(masked - whole)).max() > 1e-2
    return small


def slices(*parts):
    return tuple(UnitSlices(path=path, axis=axis, **options) for path, axis, options in parts)
