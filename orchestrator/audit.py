"""The audit chain: committed rows get a position and a hash that covers the row before them.

Serial ids commit out of order, and a chain head held until commit would be a hot lock; so rows are inserted without
a position, and one sequencer at a time per chain places what is committed. No gap, at least once, in order.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from orchestrator.registry.audit import AuditRegistry
    from orchestrator.registry.rows import AuditRow

__all__ = ["ACTIONS", "ChainReport", "event_of", "row_hash", "sequence", "verify"]

LATE_S = 60  # a row that waits longer for its position means that no sequencer works


ACTIONS = frozenset(
    {
        *("provision", "provision_failed", "start", "stop", "sleep", "wake", "recover", "destroy", "rotate_key"),
        *("upgrade", "snapshot", "restore", "fork", "port_changed"),
        *("health_check", "health_failed"),
        *("auto_restart_start", "auto_restart_success", "auto_restart_failed", "auto_restart_gave_up"),
        *("admit_denied", "policy_register", "policy_update", "product_delete"),
        *("key_issue", "key_revoke", "rewrap", "reconcile_adopt", "reconcile_orphan"),
    }
)


def event_of(row: AuditRow) -> dict[str, Any]:
    """A sequenced row as `/events` and webhooks tell it, ready for JSON."""
    return {
        "seq": row.seq,
        "timestamp": row.timestamp.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "action": row.action,
        "user_id": row.user_id,
        "engine_id": None if row.engine_id is None else str(row.engine_id),
        "status": row.status,
        "metadata": row.metadata,
    }


def row_hash(prev_hash: str, seq: int, row: AuditRow) -> str:
    """SHA-256 over the previous hash, the position and every field of the row."""
    body = orjson.dumps(
        [
            prev_hash,
            seq,
            row.id,
            row.timestamp.isoformat(),
            None if row.product_id is None else str(row.product_id),
            row.user_id,
            None if row.engine_id is None else str(row.engine_id),
            row.action,
            row.actor,
            row.status,
            row.metadata,
            row.duration_ms,
        ],
        option=orjson.OPT_SORT_KEYS,
    )
    return hashlib.sha256(body).hexdigest()


def _place(head_seq: int, head_hash: str, rows: list[AuditRow]) -> list[tuple[int, int, str, str]]:
    placed = []
    for seq, row in enumerate(rows, head_seq + 1):
        digest = row_hash(head_hash, seq, row)
        placed.append((row.id, seq, head_hash, digest))
        head_hash = digest
    return placed


async def sequence(registry: AuditRegistry) -> int:
    """Place every committed row of every chain that nobody else works on; returns how many."""
    placed = 0
    for chain in await registry.unsequenced_chains():
        while count := await registry.place(chain, _place):
            placed += count
            if count < 1000:
                break
    return placed


@dataclass(frozen=True, slots=True)
class ChainReport:
    """One chain as verified: `problem` is None when every row follows from the one before it."""

    chain: str
    rows: int
    problem: str | None


async def verify(registry: AuditRegistry) -> list[ChainReport]:
    """Check every chain against its hashes and its head, and that no row is left without a position."""
    reports = []
    for head in await registry.heads():
        seq, prev_hash, rows, problem = head.anchor_seq, head.anchor_hash, 0, None
        async for row in registry.sequenced(head.chain):
            if row.seq != seq + 1:
                problem = f"row {seq + 1} is missing"
            elif row.prev_hash != prev_hash:
                problem = f"row {row.seq} does not follow row {seq}"
            elif row.hash != row_hash(prev_hash, row.seq, row):
                problem = f"row {row.seq} was changed"
            if problem is not None:
                break
            seq, prev_hash, rows = seq + 1, row.hash or "", rows + 1
        if problem is None and seq < head.seq:
            problem = f"rows {seq + 1} to {head.seq} are missing"
        if problem is None and (seq, prev_hash) != (head.seq, head.hash):
            problem = f"the head, row {head.seq}, is not the last row, {seq}"
        reports.append(ChainReport(head.chain, rows, problem))
    waiting, age_s = await registry.unsequenced()
    if waiting and age_s > LATE_S:
        reports.append(ChainReport("(unsequenced)", waiting, f"the oldest has waited {age_s:.0f} s for a sequencer"))
    return reports
