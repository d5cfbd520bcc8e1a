"""Arrays onto devices of which other JAX processes may have some."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding


def put(leaf: jax.Array, sharding: Sharding) -> jax.Array:
    """`jax.device_put`, which in several processes takes no random keys, and no NaN.

    Args:
        leaf: an array, or typed keys; if it is on devices of this process alone, all processes must have the same.
        sharding: of the logical array.

    Raises:
        ValueError: the processes have different arrays, such as keys of different seeds.
    """
    if sharding.is_fully_addressable or not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and isinstance(sharding, NamedSharding):
        # The words of a key stay together, whatever the mesh does with the keys.
        words = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec))
        return jax.random.wrap_key_data(put(jax.random.key_data(leaf), words), impl=jax.random.key_impl(leaf))
    array = np.asarray(leaf)
    _check_same(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _check_same(array: np.ndarray) -> None:
    from jax.experimental import multihost_utils

    try:
        # As bytes, because NaN differs from itself.
        multihost_utils.assert_equal(np.frombuffer(array.tobytes(), np.uint8), "")
    except AssertionError as err:
        raise ValueError(
            f"An array of {array.dtype}{list(array.shape)} is to be on the devices of all JAX processes, but they have "
            "different ones: give all of them the same `key` and the same values."
        ) from err
