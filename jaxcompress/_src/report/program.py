"""What a function costs before its second call, and what its compiled program needs beside its arguments."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramCost:
    """The first call of a function in this process.

    Attributes:
        trace: seconds of tracing and lowering.
        compile: seconds of XLA.
        run: seconds of the first run.
        temporaries: most bytes that the program holds at once beside arguments and results; None if XLA does not say.
    """

    trace: float
    compile: float
    run: float
    temporaries: int | None

    @property
    def first_call(self) -> float:
        """Seconds of all of it."""
        return self.trace + self.compile + self.run


def compile_timed(fn: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], ProgramCost]:
    """Compiles a function for the shapes of its arguments, step by step.

    What other programs of this process have traced and compiled before is not done again: compare functions in
    processes of their own where that matters.

    Args:
        fn: not jitted.
        *args: as of every call.

    Returns:
        The compiled function, and what that took.

    Example:
        >>> import jax.numpy as jnp
        >>> run, cost = compile_timed(jnp.dot, jnp.ones((4, 4)), jnp.ones(4))
        >>> float(run(jnp.ones((4, 4)), jnp.ones(4)).sum()), cost.first_call > cost.compile > 0
        (16.0, True)
    """
    jax.block_until_ready(jax.jit(lambda x: x)(0))  # starting the backend is no part of it
    begun = time.perf_counter()
    lowered = jax.jit(fn).lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ready = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    ran = time.perf_counter()
    analysis = compiled.memory_analysis()
    temporaries = getattr(analysis, "temp_size_in_bytes", None)
    cost = ProgramCost(trace=traced - begun, compile=ready - traced, run=ran - ready, temporaries=temporaries)
    return compiled, cost
