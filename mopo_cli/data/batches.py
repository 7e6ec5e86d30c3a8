"""Batches of token rows: packing, masks, the order of rows, micro-batches under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mopo_cli.data.table import TokenRow, TokenTable, row_length


class Block(NamedTuple):
    """Tokens of a sequence and those they look at; a float mask (queries, keys), 0 where one may look, else -inf."""

    queries: slice
    keys: slice
    mask: Tensor


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Sequences with the places that matter: N responses in all, R response tokens, S sequences of T tokens.

    A prompt stands once in front of all its responses, and positions restart with each row. Apart: all rows follow
    each other in one sequence without padding; attention is told its `blocks` and works on each by itself, so
    attention_mask only stands in. Packed: several rows may share a sequence; attention_mask is
    (S, 1, T, T), True where a token may look. Plain: a sequence per response, right-padded, with a (S, T) mask and
    without positions. Everything downstream reads `source`, `target`, `owner`, `last` and `slot`: it does not care.
    """

    input_ids: Tensor  # (S, T)
    attention_mask: Tensor  # (S, 1, T, T) bool, or (S, T) where plain
    position_ids: Tensor | None  # (S, T), None where plain
    source: Tensor  # (R,) flat position in (S, T) whose output predicts a response token
    target: Tensor  # (R,) that token
    owner: Tensor  # (R,) the response it belongs to, 0 .. N-1
    last: Tensor  # (N,) flat position of each response's last token
    slot: Tensor  # (B, G) the number of response g of row b, -1 where the row has fewer
    blocks: tuple[Block, ...] | None = None

    def to(self, device: torch.device) -> TokenBatch:
        """On another device. To a GPU it goes from pinned memory while the GPU works on what it has been given."""
        if device.type == "cpu":
            return self

        def moved(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)

        blocks = self.blocks and tuple(Block(b.queries, b.keys, b.mask.to(device)) for b in self.blocks)
        return TokenBatch(*(moved(getattr(self, name)) for name in self.__slots__[:-1]), blocks)  # type: ignore[arg-type]


BLOCK = 128  # tokens of a long prompt that attend at once
BLOCK_ROWS = 8192  # rows that are encoded at once


@dataclass(frozen=True, slots=True)
class Collator:
    """Rows to a batch of every response of every row, numbered row by row."""

    pad: int
    packed: bool = True  # False for models that cannot take the packed mask
    apart: bool = False  # True for models that attend row by row (models/attention.py); needs `packed`
    budget: int | None = None  # tokens that go through the model at once, where the user sets it

    def __call__(self, rows: Sequence[TokenRow]) -> TokenBatch:
        counts = [len(row.responses) for row in rows]
        first = np.cumsum([0, *counts])
        places = np.arange(max(counts))
        slot = np.where(places < np.array(counts)[:, None], first[:-1, None] + places, -1)
        blocks = None
        if self.apart:
            groups, _ = pack(rows, alone=True)
            blocks = attention_blocks([[rows[i] for i in group] for group in groups])
            pieces, length = [[i for group in groups for i in group]], sum(map(row_length, rows))
        elif self.packed:
            pieces, length = pack(rows)
        else:  # each response behind a prompt of its own
            rows, first = [TokenRow(row.prompt, [r]) for row in rows for r in row.responses], np.arange(first[-1] + 1)
            pieces, length = [[i] for i in range(len(rows))], max(map(row_length, rows))
        layout = _Layout.empty(len(pieces), length, self.pad)
        for s, piece in enumerate(pieces):
            start = 0
            for i in piece:
                start = layout.place(s, start, rows[i], int(first[i]))
        return layout.batch(slot, self.packed, blocks)


def pack(rows: Sequence[TokenRow], least: int = 128, alone: bool = False) -> tuple[list[list[int]], int]:
    """Row numbers gathered into sequences of one length: the longest first, each into the first sequence with room.

    The length is that of the longest row, `least` at the least: long enough that little is padding, short enough that
    the attention's square does not show. With `alone` a row longer than `least` has a sequence to itself.
    """
    length = max(least, *map(row_length, rows))
    pieces: list[list[int]] = []
    room: list[int] = []
    for i in length_order(rows):
        size = row_length(rows[i])
        place = next((p for p, free in enumerate(room) if free >= size), len(room))
        if place == len(room):
            pieces.append([])
            room.append(max(least, size) if alone else length)
        pieces[place].append(i)
        room[place] -= size
    return pieces, length - min(room)


@dataclass(slots=True)
class _Layout:
    """Arrays being filled: one row after another at (sequence, start)."""

    ids: np.ndarray
    positions: np.ndarray
    row: np.ndarray  # which row a token belongs to, -1 for padding
    segment: np.ndarray  # 0 for its prompt, else 1 + its place among the responses
    source: list[np.ndarray]
    target: list[int]
    owner: list[int]
    last: dict[int, int]
    rows: int = 0

    @classmethod
    def empty(cls, sequences: int, length: int, pad: int) -> _Layout:
        shape = (sequences, length)
        zeros = np.zeros(shape, np.int64)
        return cls(np.full(shape, pad, np.int64), zeros, np.full(shape, -1, np.int64), zeros.copy(), [], [], [], {})

    def place(self, s: int, start: int, row: TokenRow, first: int) -> int:
        """Write a row, its responses numbered from `first`, at `start` of sequence s; returns where the next starts."""
        length = self.ids.shape[1]
        size = row_length(row)
        self.row[s, start : start + size] = self.rows
        self.rows += 1
        prompt_end = start + len(row.prompt)
        self.ids[s, start:prompt_end] = row.prompt
        self.positions[s, start:prompt_end] = np.arange(len(row.prompt))
        begin = prompt_end
        for place, response in enumerate(row.responses):
            end = begin + len(response)
            self.ids[s, begin:end] = response
            self.segment[s, begin:end] = place + 1
            self.positions[s, begin:end] = np.arange(len(row.prompt), len(row.prompt) + len(response))
            source = np.arange(begin - 1, end - 1)
            source[0] = prompt_end - 1  # the prompt's last token predicts the first of each response
            self.source.append(source + s * length)
            self.target += response
            self.owner += [first + place] * len(response)
            self.last[first + place] = end - 1 + s * length
            begin = end
        return begin

    def batch(self, slot: np.ndarray, packed: bool, blocks: tuple[Block, ...] | None) -> TokenBatch:
        ids, row, segment, positions = map(torch.from_numpy, (self.ids, self.row, self.segment, self.positions))
        if blocks is not None:
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)  # stands for the blocks'
        else:
            mask = _visible(row, segment) if packed else (row >= 0).long()
        return TokenBatch(
            ids,
            mask,
            positions if packed else None,
            torch.from_numpy(np.concatenate(self.source)),
            torch.tensor(self.target),
            torch.tensor(self.owner),
            torch.tensor([self.last[n] for n in range(len(self.last))]),
            torch.from_numpy(slot),
            blocks,
        )


def _visible(row: Tensor, segment: Tensor) -> Tensor:
    """(S, 1, T, T) whether a token looks at one before it: of its row's prompt, or of its own response."""
    allowed = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    return ((row[:, :, None] == row[:, None, :]) & allowed).tril()[:, None]


def attention_blocks(groups: Sequence[Sequence[TokenRow]]) -> tuple[Block, ...]:
    """Blocks of groups of rows that follow each other: one a group of short rows, some of a long row.

    A long row's prompt is taken BLOCK tokens at a time, so that little is computed of what comes after a token.
    """
    blocks: list[Block] = []
    start = 0
    for rows in groups:
        mask = np.full((sum(map(row_length, rows)),) * 2, -np.inf, np.float32)
        at = 0
        for row in rows:
            prompt_end = at + len(row.prompt)
            mask[at:prompt_end, at:prompt_end] = _causal(len(row.prompt))
            begin = prompt_end
            for response in row.responses:
                end = begin + len(response)
                mask[begin:end, at:prompt_end] = 0.0
                mask[begin:end, begin:end] = _causal(len(response))
                begin = end
            at = begin
        first = 0
        for end in [*range(BLOCK, len(rows[0].prompt), BLOCK), at] if len(rows) == 1 else [at]:
            part = torch.from_numpy(mask[first:end, :end].copy())
            blocks.append(Block(slice(start + first, start + end), slice(start, start + end), part))
            first = end
        start += at
    return tuple(blocks)


@lru_cache(2048)
def _causal(size: int) -> np.ndarray:
    return np.triu(np.full((size, size), -np.inf, np.float32), 1)


def batch_rows(size: int, batch: int, seed: int, step: int) -> list[int]:
    """The row numbers of one step: epochs are permutations drawn from (seed, epoch); every row is seen each epoch.

    Batches run across the seam between two epochs, so no row is dropped.
    """
    if size < 1:
        return []
    rows: list[int] = []
    position = step * batch
    while len(rows) < batch:
        epoch, offset = divmod(position, size)
        take = _epoch(seed, epoch, size)[offset : offset + batch - len(rows)]
        rows += take.tolist()
        position += len(take)
    return rows


def under_budget(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows in batches of at most `budget` tokens (one row at least), longest first: what cannot fit shows at once."""
    batches: list[list[int]] = []
    room = -1
    for length, row in sorted(zip(lengths, rows, strict=True), key=lambda pair: -pair[0]):
        if length > room:
            batches.append([])
            room = budget
        batches[-1].append(row)
        room -= length
    return batches


@lru_cache(4)
def _epoch(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def length_order(rows: Sequence[TokenRow]) -> list[int]:
    """Row numbers, longest first, so that a batch that does not fit shows at once."""
    sizes = row_lengths(rows)
    return sorted(range(len(rows)), key=lambda i: -sizes[i])


def row_lengths(rows: Sequence[TokenRow]) -> list[int]:
    """row_length of each; a table knows them without making its rows."""
    return rows.lengths.tolist() if isinstance(rows, TokenTable) else [row_length(row) for row in rows]
