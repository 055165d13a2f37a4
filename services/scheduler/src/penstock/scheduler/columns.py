"""Column: numbers that numpy and machine code read and write in place (decision 0062).

In Python its cells are the buffer of a numpy array, 90 ns for each number. As machine code they are a `vec`,
mypyc's array of plain doubles, 1 ns for each, and numpy's array is a view of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from librt.vecs import vec


class Column:
    """`cells` and `array` are the same memory, of one length for good."""

    __slots__ = ("array", "cells")

    def __init__(self, numbers: Sequence[float]) -> None:
        if NATIVE:
            self.cells: vec[float] = vec[float](numbers)
            self.array: NDArray[np.float64] = np.asarray(_View(memoryview(self.cells)))
        else:
            self.array = np.array(numbers, dtype=np.float64)
            self.cells = cast("vec[float]", self.array.data)


class _View:
    """What numpy is told of a buffer that it may write to, which a vec's own word does not say."""

    def __init__(self, buffer: memoryview) -> None:
        self._buffer = buffer
        own: Mapping[str, Any] = np.frombuffer(buffer).__array_interface__
        self.__array_interface__ = {**own, "data": (own["data"][0], False)}


# Whether this module runs as machine code.
NATIVE: Final = not isinstance(_View.__init__, FunctionType)
