"""Which bytes of a bucket each GPU is sent, where its workers do not need all: as much less as shortens the push.

A GPU's slot keeps its form, so that a part lies where it would lie in any case; bytes that nobody there needs are
left as they were. Of three ways the one is taken that takes the least time, by what copies cost: every GPU gets
everything; GPUs pull as ever and give each other only what is needed; or each pulls first what it needs itself. Nothing
is done that takes longer than to send everything.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Final, NamedTuple

from cpe_daemon.core.buckets import Cut, Filling
from cpe_daemon.core.copies import Copy, PeerCopy, exchange
from cpe_daemon.core.needs import Needs, Run, Runs, intersect, kinds_of, merge, runs_of
from cpe_daemon.core.topology import Costs, Share
from cpe_daemon.core.types import align

_WORTH: Final = 15 / 16
"""Of the time that everything takes, or of the work: who gains less is sent everything."""


_begin = itemgetter(0)


class Slicing(NamedTuple):
    """By GPU, the bytes of a slot that it pulls from the arena, and what it then copies from other GPUs."""

    pulls: tuple[Runs, ...]
    exchanges: tuple[tuple[PeerCopy, ...], ...]


class Wants:
    """Which bytes of each bucket's slot each GPU needs. Good for one cut, the same GPUs, and workers that need that.

    Args:
        buckets: the cut.
        order: indexes of the tensors that were cut, in the order of their names.
        workers: by GPU, what each of its workers needs; None: everything.
        costs: of copies.

    Raises:
        MisuseError: what a worker needs is not of these tensors.
    """

    def __init__(
        self, buckets: Cut, order: Sequence[int], workers: Sequence[Sequence[Needs | None]], costs: Costs
    ) -> None:
        self._buckets = buckets
        self._costs = costs
        self._gap = min(costs.fetch_bytes, costs.exchange_bytes)
        self._runs: list[tuple[Runs | None, ...]] = []
        """By class of tensors and by GPU, what is needed of one; None: everything."""
        self._classes = self._classify(order, workers)
        """By tensor."""
        self._alike: dict[tuple[tuple[int, int, int, int], ...], int] = {}
        """By the parts of a bucket, the first one that is like it: most are like another one."""
        self._wanted: list[tuple[int, tuple[Runs, ...] | None]] = []
        """By bucket, its first like, and by GPU the bytes of a slot that are needed; None: all of them, everywhere."""
        self._made: dict[tuple[int, tuple[Share, ...]], Slicing | None] = {}
        for index, filling in enumerate(buckets.fillings):
            self._wanted.append(self._want(index, filling))

    def _classify(self, order: Sequence[int], workers: Sequence[Sequence[Needs | None]]) -> list[int]:
        sizes = self._buckets.sizes
        said = [needs for several in workers for needs in several if needs is not None]
        columns = [kinds_of(needs, len(order)) for needs in said]
        numbers: dict[tuple[int, ...], int] = {}
        classes = [0] * len(order)
        for index, *kinds in zip(order, *columns, strict=True):
            key = sizes[index], *kinds
            number = numbers.get(key)
            if number is None:
                number = numbers[key] = len(numbers)
                self._runs.append(self._needed(workers, iter(kinds), sizes[index]))
            classes[index] = number
        return classes

    def _needed(
        self, workers: Sequence[Sequence[Needs | None]], kinds: Iterable[int], nbytes: int
    ) -> tuple[Runs | None, ...]:
        """By GPU, what its workers need of a tensor together, which is of a kind for each who said what it needs."""
        needed: list[Runs | None] = []
        kind = iter(kinds)
        for several in workers:
            whole, runs = False, list[Run]()
            for needs in several:
                number = next(kind) if needs is not None else 0
                if needs is None or not number:
                    whole = True
                else:
                    runs += runs_of(needs.kinds[number - 1], nbytes, self._gap)
            merged = merge(sorted(runs), self._gap)
            needed.append(None if whole or merged == ((0, nbytes),) else merged)
        return tuple(needed)

    def _want(self, index: int, filling: Filling) -> tuple[int, tuple[Runs, ...] | None]:
        classes, runs = self._classes, self._runs
        key = tuple(
            [(classes[part.tensor], part.tensor_offset, part.nbytes, part.slot_offset) for part in filling.parts]
        )
        first = self._alike.setdefault(key, index)
        if first != index:
            return self._wanted[first]
        if not any(needed is not None for number, *_ in key for needed in runs[number]):
            return index, None
        return index, tuple([self._in_slot(key, gpu) for gpu in range(len(runs[0]))])

    def _in_slot(self, parts: Iterable[tuple[int, int, int, int]], gpu: int) -> Runs:
        found: list[Run] = []
        for number, offset, nbytes, at in parts:
            needed = self._runs[number][gpu]
            if needed is None:
                found.append((at, at + nbytes))
            else:
                found += [
                    (max(start, offset) - offset + at, min(end, offset + nbytes) - offset + at)
                    for start, end in needed
                    if start < offset + nbytes and end > offset
                ]
        return merge(found, self._gap)

    def slicing(self, index: int, shares: tuple[Share, ...], *, near: bool) -> Slicing | None:
        """How a bucket is best sent; None: whole. See `slice_bucket`."""
        first, wants = self._wanted[index]
        if wants is None:
            return None
        nbytes = self._buckets.fillings[index].nbytes
        if near:  # shares go by where a version lies: there is nothing to remember
            return slice_bucket(nbytes, wants, shares, self._costs, near=True)
        key = first, shares
        if key not in self._made:
            self._made[key] = slice_bucket(nbytes, wants, shares, self._costs)
        return self._made[key]


def slice_bucket(
    nbytes: int, wants: Sequence[Runs], shares: Sequence[Share], costs: Costs, *, near: bool = False
) -> Slicing | None:
    """Decide what GPUs are sent of a bucket.

    Args:
        nbytes: used bytes of the slot.
        wants: by GPU, which of them are needed there.
        shares: who pulls what, were everything needed; empty where GPUs have nothing from each other.
        costs: of copies.
        near: the shares are such that bytes come from memory near to who pulls them, and are kept to.

    Returns:
        None if nothing is faster or less work than to send everything to everyone. Otherwise each GPU has what it needs
        in the end, and perhaps what lies in between.
    """
    count = len(wants)
    if shares:
        everything = Slicing(_pulls(shares, count), exchange(shares, count))
        united = merge(heapq.merge(*wants), costs.fetch_bytes)
        if near:
            pulled = [[tuple(intersect(united, pulls)) for pulls in everything.pulls]]
        else:
            pulled = [_equally(united, count), _own_first(wants, costs.fetch_bytes)]
        ways = [Slicing(tuple(pulls), _exchanges(wants, pulls, costs.exchange_bytes)) for pulls in pulled]
    else:
        everything = Slicing((((0, nbytes),),) * count, ((),) * count)
        ways = [Slicing(tuple([merge(needed, costs.fetch_bytes) for needed in wants]), ((),) * count)]
    best, whole = min((*_spent(way, costs), way) for way in ways), _spent(everything, costs)
    saves = best[0] <= _WORTH * whole[0] or best[1] <= _WORTH * whole[1]
    return best[2] if saves and best[0] <= whole[0] else None


def _pulls(shares: Iterable[Share], count: int) -> tuple[Runs, ...]:
    pulls: list[list[Run]] = [[] for _ in range(count)]
    for start, end, gpu in shares:
        pulls[gpu].append((start, end))
    return tuple([merge(sorted(runs), 0) for runs in pulls])


def _quota(runs: Iterable[Run], count: int) -> int:
    return align(-(-sum(end - start for start, end in runs) // count))


def _equally(united: Runs, count: int) -> list[Runs]:
    """Equal shares of what is needed, each as far as can be in one piece."""
    quota, gpu = _quota(united, count), 0
    left, pulls = quota, [list[Run]() for _ in range(count)]
    for start, end in united:
        while start < end:
            if not left:
                gpu, left = gpu + 1, quota
            stop = min(start + left, end)
            pulls[gpu].append((start, stop))
            left -= stop - start
            start = stop
    return [tuple(runs) for runs in pulls]


def _own_first(wants: Sequence[Runs], gap: int) -> list[Runs]:
    """Equal shares of what is needed, to each what it needs itself as far as that goes."""
    count = len(wants)
    pieces = _pieces([merge(needed, gap) for needed in wants])
    quotas = [_quota(((start, end) for start, end, _ in pieces), count)] * count
    pulls: list[list[Run]] = [[] for _ in range(count)]

    def share_out(start: int, end: int, takers: Iterable[int]) -> int:
        for gpu in sorted(takers, key=quotas.__getitem__, reverse=True):
            stop = min(start + quotas[gpu], end)
            if stop > start:
                pulls[gpu].append((start, stop))
                quotas[gpu] -= stop - start
                start = stop
        return start

    left = [(share_out(start, end, takers), end) for start, end, takers in pieces]
    for start, end in left:
        share_out(start, end, range(count))
    return [merge(sorted(runs), 0) for runs in pulls]


def _pieces(wants: Sequence[Runs]) -> list[tuple[int, int, tuple[int, ...]]]:
    """What is needed by the same GPUs, piece by piece: where it begins and ends, and the GPUs."""
    bounds = sorted(
        [(start, 1, gpu) for gpu, runs in enumerate(wants) for start, _ in runs]
        + [(end, 0, gpu) for gpu, runs in enumerate(wants) for _, end in runs]
    )
    pieces: list[tuple[int, int, tuple[int, ...]]] = []
    takers, since = set[int](), 0
    for at, begins, gpu in bounds:
        if takers and at > since:
            pieces.append((since, at, tuple(sorted(takers))))
        (takers.add if begins else takers.discard)(gpu)
        since = at
    return pieces


def _exchanges(wants: Sequence[Runs], pulls: Sequence[Runs], gap: int) -> tuple[tuple[PeerCopy, ...], ...]:
    """By GPU, what it needs and others pull; each begins with the GPU behind it, as `copies.exchange` has it."""
    count = len(wants)
    exchanges: list[tuple[PeerCopy, ...]] = []
    for gpu, needed in enumerate(wants):
        merged = merge(needed, gap)
        others = [(gpu + ahead) % count for ahead in range(1, count)]
        exchanges.append(
            tuple(
                [
                    PeerCopy(other, start, end - start)
                    for other in others
                    for start, end in intersect(merged, pulls[other])
                ]
            )
        )
    return tuple(exchanges)


def _spent(way: Slicing, costs: Costs) -> tuple[float, float]:
    """What it takes, in bytes that one GPU fetches meanwhile.

    Returns:
        The time of two such buckets, one behind the other in the pipeline; and the work of one, of all GPUs together.
    """
    fetches = [sum(end - start + costs.fetch_bytes for start, end in runs) for runs in way.pulls]
    exchanges = [
        sum(copy.nbytes + costs.exchange_bytes for copy in copies) / costs.exchange_speed for copies in way.exchanges
    ]
    fetch, exchanging = max(fetches), max(exchanges)
    return fetch + exchanging + max(fetch, exchanging), sum(fetches) + sum(exchanges)


def cut_to(copies: Sequence[Copy], runs: Runs) -> tuple[Copy, ...]:
    """What of copies, by ascending slot offset, falls into runs of the slot."""
    found: list[Copy] = []
    at, count = 0, len(runs)
    for copy in copies:
        origin, first = copy.origin, copy.slot_offset
        shift, last = copy.address - first, first + copy.nbytes
        while at < count and runs[at][1] <= first:
            at += 1
        inside = bisect_left(runs, last, at, key=_begin)
        within = list(runs[at:inside])
        if within and within[0][0] < first:
            within[0] = first, within[0][1]
        if within and within[-1][1] > last:
            within[-1] = within[-1][0], last
        found += [Copy(origin, start + shift, start, end - start) for start, end in within]
        at = max(at, inside - 1)  # the last of these may reach further than the copy
    return tuple(found)
