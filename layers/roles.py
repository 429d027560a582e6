"""The role of a parameter, which optimisers read: what is a matrix, and which sides it has.

The number of dimensions does not say it: the biases of all heads have two, the experts' weights
three, and stacked layers add one. So each parameter that multiplies activations declares its role
beside its logical axes. A parameter without a role is a vector for each layer, whatever its shape:
norms, biases, shares and rates of channels, depthwise convolutions.
"""

import dataclasses

from layers.sharding import Axes

# a linear map inside the model, a table whose rows are looked up, the map to logits or outputs
ROLES = ("matrix", "embedding", "head")


@dataclasses.dataclass(frozen=True)
class Role:
    """A linear map from the dimensions ``inputs`` to the dimensions ``outputs``.

    ``name``: one of `ROLES`. ``inputs``, ``outputs``: indices into the parameter's axes. Along all
    other dimensions, those of experts and of stacked layers, there is a map for each index.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @classmethod
    def of_product(cls, name: str, subscripts: str) -> "Role":
        """The role of the second operand of ``einsum(subscripts, x, weight)``."""
        operands, output = subscripts.split("->")
        x, weight = operands.split(",")
        return cls(
            name,
            tuple(i for i, letter in enumerate(weight) if letter not in output),
            tuple(i for i, letter in enumerate(weight) if letter not in x),
        )

    def sides(self, array, axes: Axes) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The dimensions of inputs and of outputs in ``array``, which may be of stacked layers."""
        stacked = array.ndim - len(axes)
        inputs, outputs = (tuple(stacked + i for i in d) for d in (self.inputs, self.outputs))
        return inputs, outputs
