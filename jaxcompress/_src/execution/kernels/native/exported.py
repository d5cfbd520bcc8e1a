"""Programs that are written to files, which may run where there are no compiled kernels."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import mlir


def unless_exported(product: Callable[..., jax.Array], plain: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`product`, but `plain` in programs that `jax.export` lowers: those hold no calls of a library.

    Neither derivatives nor batches reach it.

    Args:
        product: of arrays, to one array.
        plain: the same in JAX alone.
    """

    def either(*operands: jax.Array) -> jax.Array:
        # As programs, so that JAX sees that the product needs to know the devices when it is lowered.
        programs = [jax.make_jaxpr(function)(*operands) for function in (product, plain)]
        return _either_p.bind(*operands, product=programs[0], plain=programs[1])[0]

    return either


_either_p = Primitive("unless_exported")
_either_p.multiple_results = True


def _lowered(ctx: Any, *operands: Any, product: ClosedJaxpr, plain: ClosedJaxpr) -> Any:
    program = plain if ctx.module_context.lowering_parameters.for_export else product
    return mlir.lower_fun(jaxpr_as_fun(program), multiple_results=True)(ctx, *operands)


_either_p.def_impl(lambda *operands, product, plain: jaxpr_as_fun(product)(*operands))
_either_p.def_abstract_eval(lambda *operands, product, plain: product.out_avals)
mlir.register_lowering(_either_p, _lowered)
