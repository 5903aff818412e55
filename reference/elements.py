"""Names for single elements: which tensor, row and column a value of an index-valued checkpoint came from."""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.checkpoint.checkpoint_files import CheckpointError, DownloadError, read_headers

__all__ = ["CheckpointError", "DownloadError", "Element", "ElementIndex", "Shapes", "checkpoint_shapes"]

# A float32 names every integer up to here, and no further.
FLOAT32_EXACT_UP_TO = 2**24

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """One element of a checkpoint."""

    name: str
    index: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(map(str, self.index))}]"


class ElementIndex:
    """Numbers every element of a checkpoint, from 1 up, tensors by sorted name and each in row-major order.

    0 is nobody's number: it stands for padding and for what was never written.

    >>> index = ElementIndex({"a": (2, 3), "b": (4,)})
    >>> str(index.decode(6)), str(index.decode(7))
    ('a[1, 2]', 'b[0]')
    """

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = {name: tuple(shapes[name]) for name in sorted(shapes)}
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        starts = list(accumulate(sizes, initial=1))
        self._names = list(self.shapes)
        self._starts = starts[:-1]
        self.num_elements = starts[-1] - 1

    @classmethod
    def of_checkpoint(cls, folder: str | Path) -> "ElementIndex":
        """The index of the checkpoint in ``folder``, from its files' headers."""
        return cls(checkpoint_shapes(folder))

    @property
    def dtype(self) -> str:
        """The narrower of float32 and float64 that holds every number exactly."""
        return "float32" if self.num_elements <= FLOAT32_EXACT_UP_TO else "float64"

    def values(self, name: str) -> NDArray[np.float64]:
        """[*shape] float64: the numbers of the elements of ``name``."""
        shape = self.shapes[name]
        start = self._starts[self._names.index(name)]
        return np.arange(start, start + math.prod(shape), dtype=np.float64).reshape(shape)

    def decode(self, value: float) -> Element:
        """The element whose number is ``value``. Raises ValueError for what is no element's number."""
        number = int(value) if math.isfinite(value) else 0
        if number != value or not 1 <= number <= self.num_elements:
            raise ValueError(f"value={value} names no element: their numbers are 1 to {self.num_elements}")
        position = bisect_right(self._starts, number) - 1
        name = self._names[position]
        index = np.unravel_index(number - self._starts[position], self.shapes[name])
        return Element(name=name, index=tuple(int(i) for i in index))


def checkpoint_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the checkpoint in ``folder``, by sorted name; headers only.

    Raises:
        CheckpointError: if there is none, a file is missing or damaged, or one name is in two files.
    """
    return {name: tensor.shape for name, tensor in sorted(read_headers(Path(folder)).items())}
