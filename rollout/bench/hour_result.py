"""What `rollout.bench.hour` measures, and what must hold of it."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.layout import SPLIT_TOKENS

SLOWER = 0.10  # how far the cost in the last tenth may be from that of a young session
SLACK_BYTES = 4 * 2**20  # of the process, beside the record: free lists, pages of the heap that are partly used


@dataclass(frozen=True)
class Point:
    """After some micro-turns. Bytes are of the whole process or of the session's record."""

    chunks: int
    rows: int  # of the session
    chunk_ms: float  # `cost` of the micro-turns since the point before
    process_bytes: int  # resident
    record_bytes: int  # tokens, codes, frames, actions, log-probs, digests, as Python keeps them
    pages: int  # that the session holds in a global layer


@dataclass(frozen=True)
class Hour:
    """The result; times in milliseconds a micro-turn, as `cost` says."""

    preset: str
    first: int
    window: int
    chunks: int
    rows: int
    full_chunks: int  # micro-turns until the windows were full
    begin_ms: float  # of the tenth of all micro-turns after that
    end_ms: float  # of the last tenth
    young_ms: float  # of a session whose windows have just become full, in turns with the last tenth
    state_bytes: int  # allocated at the start, for a session of any length but for its page table
    state_moved: bool  # whether any of it was allocated anew
    pages_freed: int  # pages of the global layer's rows that were given to later rows
    settled_chunks: int  # over which growth is measured, all after windows were full
    record_bytes_per_chunk: float
    process_bytes_per_chunk: float
    tokens: int  # sampled tokens
    unequal: int  # those of them with another log-prob or row digest in one pass over the whole episode
    points: tuple[Point, ...]

    def problems(self) -> list[str]:
        found = []
        if not abs(self.end_ms / self.young_ms - 1) <= SLOWER:
            found.append(f"{self.end_ms:.3f} ms a chunk at the end, {self.young_ms:.3f} in a young session")
        if self.state_moved:
            found.append("the state was allocated anew")
        if (held := max(p.pages for p in self.points)) > (most := most_pages(self.first, self.window)):
            found.append(f"the session held {held} pages, more than {most}")
        growth = self.process_bytes_per_chunk - self.record_bytes_per_chunk
        if growth > 0.5 * self.record_bytes_per_chunk + SLACK_BYTES / self.settled_chunks:
            found.append(f"the process grew by {growth:,.0f} bytes a chunk beside the session's record")
        if self.unequal:
            found.append(f"{self.unequal} of {self.tokens} tokens differ in the learner")
        return found


def most_pages(first: int, window: int) -> int:
    """Pages that the rows of a session are in whenever a micro-turn has ended."""
    return first // SPLIT_TOKENS + window // SPLIT_TOKENS + 2
