"""A fixed random sample of rows, drawn while they stream by: memory for the rows that are taken, not for the file."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any, Generic, TypeVar

from mopo_cli.base.errors import UserError

T = TypeVar("T")
_END = b"\xff" * 9  # after every hash


class Reservoir(Generic[T]):
    """At most `limit` items: those whose prompts have the least hashes, and of each prompt all or none.

    The hash is none that the split into training, held-out and test rows looks at, so the sample leaves their shares
    alone; and which items are taken does not depend on their order. Where there are no more than `limit`, all are.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.seen = 0
        self._heap: list[tuple[int, int, T]] = []  # (-hash, place in the stream, item): the largest hash first
        self._bar = _END  # from this hash on, nothing is taken any more

    def wanted(self, prompts: Iterable[bytes | None]) -> list[int]:
        """The places of the prompts that may still get in, or are not known; the others are counted as seen."""
        bar, places, count = self._bar, [], -1
        for count, prompt in enumerate(prompts):
            if prompt is None or _hash(prompt) < bar:
                places.append(count)
        self.seen += count + 1 - len(places)
        return places

    def add(self, prompt: str, item: T) -> None:
        self.seen += 1
        digest = _hash(prompt.encode("utf-8", "surrogatepass"))
        if digest >= self._bar:
            return
        heapq.heappush(self._heap, (-int.from_bytes(digest, "big"), self.seen, item))
        while len(self._heap) > self.limit:
            worst = self._heap[0][0]
            self._bar = (-worst).to_bytes(8, "big")
            while self._heap and self._heap[0][0] == worst:
                heapq.heappop(self._heap)

    def taken(self) -> list[T]:
        """The items in the order of the stream. Raises UserError where a single prompt alone has too many."""
        if self.seen and not self._heap:
            raise UserError(
                f"dataset.max_rows={self.limit}: rows with one prompt are taken together, and the first prompt drawn "
                "has more rows than that; raise dataset.max_rows"
            )
        return [item for _, _, item in sorted(self._heap, key=lambda entry: entry[1])]

    @property
    def note(self) -> str | None:
        """What was left out, in words; None where all were taken."""
        if self.seen == len(self._heap):
            return None
        return f"{len(self._heap):,} of {self.seen:,} rows, a fixed sample (dataset.max_rows)"


def sampled(items: Iterable[tuple[str, T]], reservoir: Reservoir[T], notes: dict[str, Any], name: str) -> list[T]:
    """Of (prompt, item) pairs the items that the reservoir takes, with a note under `name` of what it left out."""
    for prompt, item in items:
        reservoir.add(prompt, item)
    taken = reservoir.taken()
    if reservoir.note:
        notes[name] = reservoir.note
    return taken


def _hash(prompt: bytes) -> bytes:
    return blake2b(prompt, digest_size=8, person=b"mopo.max_rows").digest()
