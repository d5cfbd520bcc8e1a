"""Session-wide settings: the CPU with 8 forced devices, strict ranks, array-level shapes checked as they run."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import jaxtyping

jax.config.update("jax_numpy_rank_promotion", "raise")
# Every jaxtyping annotation of the package is checked at run time: one that nothing runs would rot.
jaxtyping.install_import_hook("jaxcompress", "beartype.beartype")

pytest_plugins = ["small_bert"]
