"""Operations with a hand-written backward pass that also support forward mode.

`jax.custom_vjp` does not support `jax.jvp`, `jax.jacfwd` and Hessian-vector products. Here the
derivative of an operation is one linear function of the tangents: its value is the derivative of
the operation's reference, and its transpose is the hand-written backward pass.
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
    """The function ``f(*arguments)`` of pytrees of arrays, with a derivative from these three.

    Args:
      forward: ``forward(*arguments) -> (result, saved)``; ``saved`` is for the backward pass.
      backward: ``backward(arguments, saved, cotangents) -> gradients``, one for each argument; None
        for an argument, or an array in it, without gradient.
      reference: the same function in plain JAX. Forward mode and derivatives of the gradient
        differentiate it; it may require more memory.
    """

    @jax.custom_jvp
    def run(*arguments):
        return forward(*arguments)

    @run.defjvp
    def derivative(primals, tangents):
        result, saved = run(*primals)
        leaves, structure = jax.tree.flatten(primals)
        float_indices = [i for i, a in enumerate(leaves) if jnp.issubdtype(a.dtype, jnp.inexact)]

        def push(arguments_and_saved, float_tangents):
            primal_leaves = jax.tree.leaves(arguments_and_saved[0])

            def of_floats(*arrays):
                all_arrays = list(primal_leaves)
                for i, a in zip(float_indices, arrays, strict=True):
                    all_arrays[i] = a
                return reference(*jax.tree.unflatten(structure, all_arrays))

            return jax.jvp(of_floats, [primal_leaves[i] for i in float_indices], float_tangents)[1]

        def pull(arguments_and_saved, cotangents):
            gradients = tuple(backward(*arguments_and_saved, cotangents))
            gradient_leaves = _leaves_like(structure, gradients)
            return [gradient_leaves[i] for i in float_indices]

        float_tangents = [jax.tree.leaves(tangents)[i] for i in float_indices]
        float_tangents = linear(push, pull, (primals, saved), float_tangents)
        # only `push` is differentiated again, and it does not use `saved`
        return (result, saved), (float_tangents, jax.tree.map(_no_tangent, saved))

    return lambda *arguments: run(*arguments)[0]


def linear(push: Callable, pull: Callable, residuals: Any, tangents: Any) -> Any:
    """``push(residuals, tangents)``, linear in ``tangents``, with the transpose ``pull``.

    ``pull(residuals, cotangents)`` has the structure of ``tangents``; None is 0. Derivatives by
    ``residuals`` are those of ``push``.
    """
    fixed_leaves, fixed_tree = jax.tree.flatten(residuals)
    moved_leaves, moved_tree = jax.tree.flatten(tangents)

    def flat_push(*arrays):
        residuals = jax.tree.unflatten(fixed_tree, arrays[: len(fixed_leaves)])
        return push(residuals, jax.tree.unflatten(moved_tree, arrays[len(fixed_leaves) :]))

    program, shape = jax.make_jaxpr(flat_push, return_shape=True)(*fixed_leaves, *moved_leaves)
    result_tree = jax.tree.structure(shape)

    def flat_pull(*arrays):
        residuals = jax.tree.unflatten(fixed_tree, arrays[: len(fixed_leaves)])
        cotangents = jax.tree.unflatten(result_tree, arrays[len(fixed_leaves) :])
        results = _leaves_like(moved_tree, pull(residuals, cotangents))
        pairs = zip(results, moved_leaves, strict=True)
        return [jnp.zeros(a.shape, a.dtype) if g is None else g for g, a in pairs]

    plain = jaxpr_as_fun(program)
    results = _linear_p.bind(
        *fixed_leaves,
        *moved_leaves,
        program=program,
        plain=plain,
        pull=flat_pull,
        fixed=len(fixed_leaves),
    )
    return jax.tree.unflatten(result_tree, results)


def _no_tangent(a: jax.Array) -> Any:
    inexact = jnp.issubdtype(a.dtype, jnp.inexact)
    return jnp.zeros(a.shape, a.dtype if inexact else jax.dtypes.float0)


def _leaves_like(structure, tree: Any) -> list[Any]:
    """The leaves of ``tree``, which may have None in the place of a subtree of ``structure``."""
    leaves: list[Any] = []

    def extend(part, like):
        leaves.extend([None] * jax.tree.structure(like).num_leaves if part is None else [part])

    indices = jax.tree.unflatten(structure, range(structure.num_leaves))
    jax.tree.map(extend, tree, indices, is_leaf=lambda a: a is None)
    return leaves


# `program` is evaluated; `plain` is the same function in a form that JAX can differentiate; `pull`
# is its transpose. In all three the first `fixed` operands are residuals.
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
# JAX 0.12 calls this instead if the program contains its ragged products, which it rewrites first
_linear_p.to_lojax = _evaluate  # type: ignore[attr-defined]


def _jvp(primals, tangents, *, program, plain, pull, fixed):
    bind = functools.partial(_linear_p.bind, program=program, plain=plain, pull=pull, fixed=fixed)
    result, tangents = (
        bind(*primals),
        [ad.instantiate_zeros(t) if i >= fixed else t for i, t in enumerate(tangents)],
    )
    if all(type(t) is ad.Zero for t in tangents[:fixed]):
        return result, bind(*primals[:fixed], *tangents[fixed:])
    # a residual has a tangent too: differentiate the plain function
    floats = [i for i, a in enumerate(primals) if jnp.issubdtype(a.dtype, jnp.inexact)]

    def of_floats(*arrays):
        all_operands = list(primals)
        for i, a in zip(floats, arrays, strict=True):
            all_operands[i] = a
        return plain(*all_operands)

    float_tangents = [ad.instantiate_zeros(tangents[i]) for i in floats]
    return result, jax.jvp(of_floats, [primals[i] for i in floats], float_tangents)[1]


def _transpose(cotangents, *operands, program, plain, pull, fixed):
    residuals, tangents = operands[:fixed], operands[fixed:]
    cotangents = [
        jnp.zeros(aval.shape, aval.dtype) if type(ct) is ad.Zero else ct
        for ct, aval in zip(cotangents, program.out_avals, strict=True)
    ]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in program.in_avals[fixed:]]

    def plain_pull(*arrays):
        of_tangents = functools.partial(plain, *arrays[:fixed])
        return list(jax.linear_transpose(of_tangents, *shapes)(list(arrays[fixed:])))

    gradients = _linear_p.bind(
        *residuals,
        *cotangents,
        program=jax.make_jaxpr(pull)(*residuals, *cotangents),
        plain=plain_pull,
        pull=jaxpr_as_fun(program),
        fixed=fixed,
    )
    is_needed = [ad.is_undefined_primal(a) for a in tangents]
    needed_gradients = [g if w else None for g, w in zip(gradients, is_needed, strict=True)]
    return [None] * fixed + needed_gradients


def _batch(operands, dims, *, program, plain, pull, fixed):
    size = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)
    # all tangents are batched along the first axis, so that all cotangents are too
    tangents = [
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(operands[fixed:], dims[fixed:], strict=True)
    ]
    residuals, residual_dims = operands[:fixed], dims[:fixed]

    def batched(function, count):
        return jax.vmap(function, (*residual_dims, *[0] * count))

    count_of_results = len(program.out_avals)
    results_of_batch = _linear_p.bind(
        *residuals,
        *tangents,
        program=jax.make_jaxpr(batched(jaxpr_as_fun(program), len(tangents)))(
            *residuals, *tangents
        ),
        plain=batched(plain, len(tangents)),
        pull=batched(pull, count_of_results),
        fixed=fixed,
    )
    return results_of_batch, [0] * count_of_results


ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch
