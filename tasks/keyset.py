"""Sets of 16-byte keys that cost 16 bytes a key: sorted arrays instead of Python objects, asked in batches."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tasks.keys import KEY_BYTES

Keys = npt.NDArray[np.bytes_]
"""Keys as an array of `S16`. An element that is taken out loses its trailing zero bytes."""


def keys_of(keys: Sequence[bytes]) -> Keys:
    """An array of keys."""
    return np.frombuffer(b"".join(keys), dtype=f"S{KEY_BYTES}")


def column_keys(column: pa.ChunkedArray) -> Keys:
    """The keys of a Parquet column, without an object for each."""
    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    return np.frombuffer(array.buffers()[1] or b"", dtype=f"S{KEY_BYTES}", count=len(array), offset=array.offset * KEY_BYTES)


def find(ordered: Keys, keys: Keys) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Where `keys` are in a sorted array, and which of them are in it at all."""
    if not len(ordered):
        return np.zeros(len(keys), np.int64), np.zeros(len(keys), np.bool_)
    places = np.minimum(np.searchsorted(ordered, keys), len(ordered) - 1)
    return places, ordered[places] == keys


class KeySet:
    """A growing set. Held as a few sorted arrays, each at least twice as long as the next."""

    def __init__(self) -> None:
        self._runs: list[Keys] = []

    def add(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Adds keys; returns which were new. Of equal ones in `keys`, the first is."""
        fresh = np.zeros(len(keys), np.bool_)
        fresh[np.unique(keys, return_index=True)[1]] = True
        fresh &= ~self.holds(keys)
        self._runs.append(np.sort(keys[fresh]))
        while len(self._runs) > 1 and 2 * len(self._runs[-1]) > len(self._runs[-2]):
            last, run = self._runs.pop(), self._runs[-1]
            run.resize(len(run) + len(last), refcheck=False)  # a joined copy would take the memory of both for a moment
            run[-len(last) :] = last
            run.sort()
        return fresh

    def holds(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Which keys are in the set."""
        found = np.zeros(len(keys), np.bool_)
        for run in self._runs:
            found |= find(run, keys)[1]
        return found
