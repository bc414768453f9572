"""What the kernels read of a call's segments beside the rows: made on the host, sent to the device in one copy.

A forward pass makes these tables once, by `upload`, together with everything else that the host knows before; every
layer then finds them on its segments. An op that is called by itself makes and sends what it needs.

Kernels know a sequence by its number in the call, s: ``pages[s]`` names the pages of its keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.checks.sequences import no_such_page
from kernels.layout import SPLIT_TOKENS, PagedKV, Segments
from kernels.triton import deferred
from kernels.upload import send

Numbers = NDArray[np.int64]

_sizes: set[int] = set()
"""Sizes of tiles that calls of this process have asked for: a model's heads ask for one or two in its first forward
pass, and from then on `upload` sends their tables with the rest."""


@dataclass(eq=False)
class Host:
    """The segments as arrays, [S] each."""

    slot: Numbers
    start: Numbers  # absolute position of the first row
    first: Numbers  # the first row's number in the call
    count: Numbers  # rows

    @staticmethod
    def of(segments: Segments) -> Host:
        slot, start, offset = (
            x.cpu().numpy().astype(np.int64) for x in (segments.slot, segments.start, segments.offset)
        )
        return Host(slot, start, offset[:-1], np.diff(offset))


@dataclass(eq=False)
class Tables:
    """On the device, int32, but for ``host``."""

    host: Host
    slot: Tensor  # [S]
    start: Tensor  # [S]
    offset: Tensor  # [S + 1]
    segment: Tensor  # [T], the segment of each row
    tiles: dict[int, Tensor] = field(default_factory=dict)  # by size: `tiles_of`
    pages: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by id: (page table, its rows [S, pages])
    whole: Tensor | None = None  # [S, pages], of sequences without a cache: `whole_pages`
    checked: set[tuple[int, ...]] = field(default_factory=set)  # (id of a page table, window, first, pages) found good


def tables_of(segments: Segments, device: torch.device) -> Tables:
    """The tables of ``segments`` on ``device``, made when they are first asked for."""
    made: dict[torch.device, Tables] = segments.__dict__.setdefault("_tables", {})
    if device not in made:
        host = Host.of(segments)
        slot, start, offset, segment = send(_fields(segments, host), device)
        made[device] = Tables(host, slot, start, offset, segment)
    return made[device]


def upload(
    segments: Segments, page_tables: Sequence[Tensor], parts: tuple[Tensor, ...], device: torch.device
) -> tuple[Segments, tuple[Tensor, ...]]:
    """(segments of the coming forward pass, with their tables on ``device``; copies there of ``parts``), by one copy.

    ``page_tables``: those that the pass will read, int32 [slots, pages] on the CPU; what they say now counts for the
    whole pass. None: it is over whole sequences. Parts that lie on ``device`` already are returned as they are."""
    host, sizes = Host.of(segments), sorted(_sizes)
    fields = _fields(segments, host)
    tiles = [tiles_of(host, size) for size in sizes]
    pages = [_int32(_rows(table, host)) for table in page_tables] or [_int32(whole_pages(host))]
    status = deferred.fresh()
    moving = [i for i, part in enumerate(parts) if part.device.type == "cpu"]
    sent = send([*fields, *tiles, *pages, *status, *(parts[i] for i in moving)], device)

    def take(count: int) -> list[Tensor]:
        taken, sent[:count] = sent[:count], []
        return taken

    slot, start, offset, segment = take(len(fields))
    tables = Tables(host, slot, start, offset, segment)
    tables.tiles = dict(zip(sizes, take(len(tiles)), strict=True))
    there = take(len(pages))
    if page_tables:
        tables.pages = {id(t): (t, rows) for t, rows in zip(page_tables, there, strict=True)}
    else:
        tables.whole = there[0]
    deferred.use(take(len(status)))
    moved = dict(zip(moving, sent, strict=True))
    own = replace(segments)  # what is true of this pass stays with it: the caller's segments may be used again
    own.__dict__["_tables"] = {slot.device: tables}
    return own, tuple(moved.get(i, part) for i, part in enumerate(parts))


def tiles(segments: Segments, size: int, device: torch.device) -> Tensor:
    """`tiles_of` on ``device``."""
    _sizes.add(size)
    tables = tables_of(segments, device)
    if size not in tables.tiles:
        (tables.tiles[size],) = send([tiles_of(tables.host, size)], device)
    return tables.tiles[size]


def tiles_of(host: Host, size: int) -> Tensor:
    """int32 [tiles, 5] on the CPU: the aligned ranges of ``size`` positions that the segments' rows reach.

    A row is (s, shift, start, end, base): position p of sequence s is row p + shift of the call when start <= p < end,
    and the range is base … base + size - 1.

    >>> tiles_of(Host.of(Segments.build([4], [30], [3])), 32).tolist()
    [[0, -30, 30, 33, 0], [0, -30, 30, 33, 32]]
    """
    end = host.start + host.count
    first = host.start // size
    count = (end - 1) // size - first + 1
    which = np.repeat(np.arange(len(count)), count)
    place = np.arange(len(which)) - (np.cumsum(count) - count)[which]
    columns = (which, (host.first - host.start)[which], host.start[which], end[which], (first[which] + place) * size)
    return _int32(np.stack(columns, axis=1))


def whole_pages(host: Host) -> Numbers:
    """[S, pages]: temporary pages of whole sequences, numbered through."""
    needed = -(-host.count // SPLIT_TOKENS)
    return (np.cumsum(needed) - needed)[:, None] + np.arange(needed.max(initial=0))


def whole(segments: Segments, device: torch.device) -> tuple[Tensor, int]:
    """(`whole_pages` on ``device``, how many pages there are)."""
    tables = tables_of(segments, device)
    if tables.whole is None:
        (tables.whole,) = send([_int32(whole_pages(tables.host))], device)
    return tables.whole, int((-(-tables.host.count // SPLIT_TOKENS)).sum())


def page_rows(segments: Segments, cache: PagedKV, reach: int, first: int = 0) -> Tensor:
    """The page table's rows of the call's sequences, int32 [S, pages], beside the keys.

    Raises ValueError for a split of keys without a page, before anything is written; once a forward pass for each
    table and window. Waits for the device only when the page table lies there. ``reach`` is the window, ``first`` the
    number of first keys that are seen for ever."""
    device, table = cache.key.device, cache.table
    tables = tables_of(segments, device)
    kept = tables.pages.get(id(table))
    key = id(table), reach, first, cache.key.shape[0]
    if kept is not None and key in tables.checked:
        return kept[1]
    rows = _rows(table, tables.host)
    bad = _without_page(tables.host, rows, reach, first, cache.key.shape[0])
    if bad is not None:
        raise no_such_page(segments, *bad, cache)
    if kept is not None:
        tables.checked.add(key)
        return kept[1]
    return send([_int32(rows)], device)[0]


def _fields(segments: Segments, host: Host) -> list[Tensor]:
    segment = _int32(np.repeat(np.arange(len(host.count)), host.count))
    return [segments.slot.cpu(), segments.start.cpu(), segments.offset.cpu(), segment]


def _rows(table: Tensor, host: Host) -> NDArray[np.int32]:
    """The rows of the call's slots; -1 everywhere in one of a slot that is none."""
    known = (host.slot >= 0) & (host.slot < table.shape[0])
    if not len(table):
        return np.full((len(known), table.shape[1]), -1, dtype=np.int32)
    rows: NDArray[np.int32] = table.cpu().numpy()[np.where(known, host.slot, 0)]
    rows[~known] = -1
    return rows


def _without_page(host: Host, rows: NDArray[np.int32], reach: int, first: int, pages: int) -> tuple[int, int] | None:
    """The first (segment, split) of keys that a segment sees and that has none of ``pages`` pages."""
    skipped = np.maximum(np.maximum(host.start - (reach - 1), 0) // SPLIT_TOKENS - first // SPLIT_TOKENS, 0)
    count = (host.start + host.count - 1) // SPLIT_TOKENS - skipped + 1
    which = np.repeat(np.arange(len(count)), count)
    split = np.arange(len(which)) - (np.cumsum(count) - count)[which]
    split += np.where(split < first // SPLIT_TOKENS, 0, skipped[which])
    inside = split < rows.shape[1]
    page = np.full(len(which), -1)
    page[inside] = rows[which[inside], split[inside]]
    bad = ((page < 0) | (page >= pages)).nonzero()[0]
    return (int(which[bad[0]]), int(split[bad[0]])) if len(bad) else None


def _int32(x: NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32))
