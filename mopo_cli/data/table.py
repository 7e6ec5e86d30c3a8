"""Token rows in flat arrays: four bytes a token, in memory or mapped from a file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import overload

import numpy as np

from mopo_cli.base.files import whole

BLOCK = 4096  # rows that are gathered at a time, for the digest


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One prompt and its responses as token ids; a response ends with the end-of-sequence token."""

    prompt: list[int]
    responses: list[list[int]]


def row_length(row: TokenRow) -> int:
    """Tokens of a row with its prompt written once."""
    return len(row.prompt) + sum(map(len, row.responses))


@dataclass(frozen=True, slots=True, eq=False)
class TokenTable(Sequence[TokenRow]):
    """Rows that are made into lists as they are asked for.

    A row is a run of pieces, its prompt and then its responses; a piece is a run of tokens.
    """

    ids: np.ndarray  # int32, the tokens of all pieces
    ends: np.ndarray  # (pieces + 1,) int64: piece p is ids[ends[p] : ends[p + 1]]
    runs: np.ndarray  # (N, 2) int64: row n has the pieces runs[n, 0] .. runs[n, 1] - 1

    def __len__(self) -> int:
        return len(self.runs)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> TokenTable: ...
    def __getitem__(self, index: int | slice) -> TokenRow | TokenTable:
        if isinstance(index, slice):
            return TokenTable(self.ids, self.ends, self.runs[index])
        first, last = self.runs[index].tolist()
        ends = self.ends[first : last + 1].tolist()
        ids, start = self.ids[ends[0] : ends[-1]].tolist(), ends[0]
        pieces = [ids[a - start : b - start] for a, b in pairwise(ends)]
        return TokenRow(pieces[0], pieces[1:])

    def __iter__(self) -> Iterator[TokenRow]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @property
    def lengths(self) -> np.ndarray:
        """(N,) row_length of each row."""
        return self.ends[self.runs[:, 1]] - self.ends[self.runs[:, 0]]

    @property
    def prompt_lengths(self) -> np.ndarray:
        """(N,) tokens of each row's prompt."""
        return self.ends[self.runs[:, 0] + 1] - self.ends[self.runs[:, 0]]

    @property
    def longest_responses(self) -> np.ndarray:
        """(N,) tokens of each row's longest response, 0 where it has none."""
        if not len(self):
            return np.zeros(0, np.int64)
        sizes = np.append(np.diff(self.ends), 0)
        sizes[self.runs[:, 0]] = 0  # the prompts: a row's longest piece is a response
        return np.maximum.reduceat(sizes, self.runs.ravel())[::2]

    def select(self, rows: np.ndarray) -> TokenTable:
        """The rows of a boolean mask or of these numbers; the tokens are shared."""
        return TokenTable(self.ids, self.ends, self.runs[rows])

    def digest(self) -> str:
        """A hash of every row's tokens and of where its pieces end, whatever else the arrays hold."""
        found = hashlib.sha256(f"{len(self)}\n".encode())
        for start in range(0, len(self), BLOCK):
            runs = self.runs[start : start + BLOCK]
            pieces = spans(runs[:, 0], runs[:, 1])
            bounds = self.ends[pieces], self.ends[pieces + 1]
            for part in (runs[:, 1] - runs[:, 0], bounds[1] - bounds[0], self.ids[spans(*bounds)]):
                found.update(np.ascontiguousarray(part).data)
        return found.hexdigest()

    def save(self, path: Path) -> None:
        """A directory with a file an array; whole or absent."""
        with whole(path) as place:
            for name in self.__slots__:
                np.save(place / f"{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, path: Path) -> TokenTable:
        """What `save` left, mapped: tokens are read from the file as they are asked for."""
        return cls(*(np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in cls.__slots__))


def spans(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The numbers starts[0] .. ends[0] - 1, starts[1] .. ends[1] - 1 and so on."""
    sizes = ends - starts
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))


class TableBuilder:
    """Collects pieces, block by block, into a TokenTable."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._sizes: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []

    def add(self, ids: np.ndarray, sizes: np.ndarray, counts: np.ndarray) -> None:
        """ids: all tokens; sizes: tokens of each piece; counts: pieces of each row."""
        self._ids.append(ids.astype(np.int32, copy=False))
        self._sizes.append(sizes.astype(np.int64, copy=False))
        self._counts.append(counts.astype(np.int64, copy=False))

    def table(self) -> TokenTable:
        ids = np.concatenate([np.zeros(0, np.int32), *self._ids])
        ends = np.cumsum(np.concatenate([np.zeros(1, np.int64), *self._sizes]))
        last = np.cumsum(np.concatenate([np.zeros(0, np.int64), *self._counts]))
        first = np.concatenate([np.zeros(1, np.int64), last])[:-1]
        return TokenTable(ids, ends, np.stack([first, last], axis=1))
