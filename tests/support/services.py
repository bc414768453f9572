"""A small service, and what its clients' sessions have recorded."""

from __future__ import annotations

from model.backbone.transformer import InteractionModel
from rollout.engines.embedded import SessionEngine
from rollout.engines.service import Client, Service
from rollout.turn.grammar import context_rows
from rollout.turn.vocabulary import Vocabulary

MAX_CHUNKS = 12
RECORD = ("tokens", "sampled", "logprob", "digest", "actions")


def make_service(model: InteractionModel, slots: int = 3, idle_chunks: int = 4) -> Service:
    """A service on an engine of its own, which has room for `MAX_CHUNKS` chunks a session and no more."""
    engine = SessionEngine(model, Vocabulary.build(model.vocab), slots=slots, max_tokens=context_rows(MAX_CHUNKS, 1))
    return Service(engine, max_chunks=MAX_CHUNKS, idle_chunks=idle_chunks)


def record(client: Client) -> list[object]:
    """What the client's session has sampled so far."""
    return [getattr(client.session, name) for name in RECORD]
