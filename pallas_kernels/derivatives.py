"""Ops with a hand-written backward pass that forward mode can differentiate as well.

`jax.custom_vjp` refuses `jax.jvp`, and with it `jax.jacfwd` and Hessian-vector products. Here an
op's derivative is one linear function of the tangents: evaluated forwards it is the derivative of
the op's reference, and its transpose is the hand-written pass.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir


def differentiable(
    forward: Callable[..., tuple[Any, Any]],
    backward: Callable[..., Sequence[Any]],
    reference: Callable[..., Any],
) -> Callable[..., Any]:
    """``f(*arguments)``, pytrees of arrays, with the derivative that these three give.

    Args:
      forward: ``forward(*arguments) -> (result, saved)``; ``saved`` is kept for the backward pass.
      backward: ``backward(arguments, saved, cotangents) -> gradients``, one for each argument; None
        where an argument, or an array in it, has none.
      reference: the same function of ``arguments`` as plain JAX. Forward mode and derivatives of
        the gradient differentiate it; it may take more memory.
    """

    @jax.custom_jvp
    def run(*arguments):
        return forward(*arguments)

    @run.defjvp
    def derivative(primals, tangents):
        result, saved = run(*primals)
        leaves, structure = jax.tree.flatten(primals)
        moving = [i for i, a in enumerate(leaves) if jnp.issubdtype(a.dtype, jnp.inexact)]

        def push(arguments_and_saved, moved):
            fixed = jax.tree.leaves(arguments_and_saved[0])

            def of_moving(*arrays):
                every = list(fixed)
                for i, a in zip(moving, arrays, strict=True):
                    every[i] = a
                return reference(*jax.tree.unflatten(structure, every))

            return jax.jvp(of_moving, [fixed[i] for i in moving], moved)[1]

        def pull(arguments_and_saved, cotangents):
            gradients = tuple(backward(*arguments_and_saved, cotangents))
            found = _leaves_like(structure, gradients)
            return [found[i] for i in moving]

        moved = [jax.tree.leaves(tangents)[i] for i in moving]
        moved = linear(push, pull, (primals, saved), moved)
        # `push`, which alone is differentiated again, does not look at what is saved
        return (result, saved), (moved, jax.tree.map(_no_tangent, saved))

    return lambda *arguments: run(*arguments)[0]


def linear(push: Callable, pull: Callable, residuals: Any, tangents: Any) -> Any:
    """``push(residuals, tangents)``, linear in ``tangents``, whose transpose is ``pull``.

    ``pull(residuals, cotangents)`` returns what ``tangents`` are of; None is 0. Derivatives by
    ``residuals`` are those of ``push``.
    """
    fixed, fixed_tree = jax.tree.flatten(residuals)
    moved, moved_tree = jax.tree.flatten(tangents)

    def flat_push(*arrays):
        residuals = jax.tree.unflatten(fixed_tree, arrays[: len(fixed)])
        return push(residuals, jax.tree.unflatten(moved_tree, arrays[len(fixed) :]))

    program, shape = jax.make_jaxpr(flat_push, return_shape=True)(*fixed, *moved)
    result_tree = jax.tree.structure(shape)

    def flat_pull(*arrays):
        residuals = jax.tree.unflatten(fixed_tree, arrays[: len(fixed)])
        cotangents = jax.tree.unflatten(result_tree, arrays[len(fixed) :])
        found = _leaves_like(moved_tree, pull(residuals, cotangents))
        pairs = zip(found, moved, strict=True)
        return [jnp.zeros(a.shape, a.dtype) if g is None else g for g, a in pairs]

    plain = jaxpr_as_fun(program)
    found = _linear_p.bind(
        *fixed, *moved, program=program, plain=plain, pull=flat_pull, fixed=len(fixed)
    )
    return jax.tree.unflatten(result_tree, found)


def _no_tangent(a: jax.Array) -> Any:
    inexact = jnp.issubdtype(a.dtype, jnp.inexact)
    return jnp.zeros(a.shape, a.dtype if inexact else jax.dtypes.float0)


def _leaves_like(structure, tree: Any) -> list[Any]:
    """The leaves of ``tree``, which may have None in place of a subtree of ``structure``."""
    found: list[Any] = []

    def extend(part, like):
        found.extend([None] * jax.tree.structure(like).num_leaves if part is None else [part])

    every = jax.tree.unflatten(structure, range(structure.num_leaves))
    jax.tree.map(extend, tree, every, is_leaf=lambda a: a is None)
    return found


# `program` is what is evaluated; `plain` the same function as JAX can differentiate it; `pull` its
# transpose. The first `fixed` operands are residuals, in all three.
_linear_p = Primitive("linear")
_linear_p.multiple_results = True


def _evaluate(*arrays, program, plain, pull, fixed):
    del plain, pull, fixed
    return jaxpr_as_fun(program)(*arrays)


_linear_p.def_impl(_evaluate)
_linear_p.def_effectful_abstract_eval(
    lambda *_, program, plain, pull, fixed: (program.out_avals, program.effects)
)
mlir.register_lowering(_linear_p, mlir.lower_fun(_evaluate, multiple_results=True))


def _jvp(primals, tangents, *, program, plain, pull, fixed):
    bind = functools.partial(_linear_p.bind, program=program, plain=plain, pull=pull, fixed=fixed)
    result, tangents = (
        bind(*primals),
        [ad.instantiate_zeros(t) if i >= fixed else t for i, t in enumerate(tangents)],
    )
    if all(type(t) is ad.Zero for t in tangents[:fixed]):
        return result, bind(*primals[:fixed], *tangents[fixed:])
    # a residual moves too: by the product rule, of the plain function
    floats = [i for i, a in enumerate(primals) if jnp.issubdtype(a.dtype, jnp.inexact)]

    def of_floats(*arrays):
        every = list(primals)
        for i, a in zip(floats, arrays, strict=True):
            every[i] = a
        return plain(*every)

    moved = [ad.instantiate_zeros(tangents[i]) for i in floats]
    return result, jax.jvp(of_floats, [primals[i] for i in floats], moved)[1]


def _transpose(cotangents, *operands, program, plain, pull, fixed):
    residuals, moved = operands[:fixed], operands[fixed:]
    cotangents = [
        jnp.zeros(aval.shape, aval.dtype) if type(ct) is ad.Zero else ct
        for ct, aval in zip(cotangents, program.out_avals, strict=True)
    ]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in program.in_avals[fixed:]]

    def plain_pull(*arrays):
        of_moved = functools.partial(plain, *arrays[:fixed])
        return list(jax.linear_transpose(of_moved, *shapes)(list(arrays[fixed:])))

    found = _linear_p.bind(
        *residuals,
        *cotangents,
        program=jax.make_jaxpr(pull)(*residuals, *cotangents),
        plain=plain_pull,
        pull=jaxpr_as_fun(program),
        fixed=fixed,
    )
    wanted = [ad.is_undefined_primal(a) for a in moved]
    gradients = [g if w else None for g, w in zip(found, wanted, strict=True)]
    return [None] * fixed + gradients


def _batch(operands, dims, *, program, plain, pull, fixed):
    size = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)
    # tangents along the first axis, all of them, so that their cotangents are too
    moved = [
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(operands[fixed:], dims[fixed:], strict=True)
    ]
    residuals, residual_dims = operands[:fixed], dims[:fixed]

    def each(function, count):
        return jax.vmap(function, (*residual_dims, *[0] * count))

    results = len(program.out_avals)
    found = _linear_p.bind(
        *residuals,
        *moved,
        program=jax.make_jaxpr(each(jaxpr_as_fun(program), len(moved)))(*residuals, *moved),
        plain=each(plain, len(moved)),
        pull=each(pull, results),
        fixed=fixed,
    )
    return found, [0] * results


ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch
