"""Pseudo-random permutations of any length that take no memory."""

import math

import numpy as np

ROUNDS = 8


class Permutation:
    """A pseudo-random permutation of 0 … length - 1, whose places are computed independently.

    It is a keyed Feistel network on two digits of mixed radix, l < a and r < b with a · b barely more than
    length, whose rounds add a hash of one digit to the other in turn. Results beyond length go through the
    network again until they are not (cycle walking). Both are from Black & Rogaway 2002, "Ciphers with
    Arbitrary Finite Domains"; the hash is the finaliser of splitmix64 (Steele, Lea & Flood 2014).
    """

    def __init__(self, length: int, stream: tuple[int, ...]) -> None:
        """
        Args:
            stream: seeds the permutation.
        """
        self.length = length
        self._left = math.isqrt(max(0, length - 1)) + 1
        self._right = -(-length // self._left) or 1
        self._keys = np.random.default_rng(stream).integers(2**64, size=ROUNDS, dtype=np.uint64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, places: slice | np.ndarray) -> np.ndarray:
        """The elements at some places: (places,), int64."""
        if isinstance(places, slice):
            places = np.arange(*places.indices(self.length))
        found = self._once(places.astype(np.uint64))
        while (beyond := found >= self.length).any():
            found[beyond] = self._once(found[beyond])
        return found.astype(np.int64)

    def _once(self, numbers: np.ndarray) -> np.ndarray:
        left: np.ndarray = numbers // np.uint64(self._right)
        right: np.ndarray = numbers % np.uint64(self._right)
        for turn, key in enumerate(self._keys):
            if turn % 2:
                right = (right + _hash(left ^ key)) % np.uint64(self._right)
            else:
                left = (left + _hash(right ^ key)) % np.uint64(self._left)
        return left * np.uint64(self._right) + right


def _hash(numbers: np.ndarray) -> np.ndarray:
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (numbers ^ (numbers >> np.uint64(31))) >> np.uint64(1)  # so that a sum cannot overflow
