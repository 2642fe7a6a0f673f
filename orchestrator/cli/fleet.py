"""`orchestrator status` and `orchestrator events`: the fleet now, and what happens in it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel

from orchestrator.cli.output import clock, err, milliseconds, out, print_json, print_json_line, state, table
from orchestrator.cli.session import Session, remote

if TYPE_CHECKING:
    from rich.console import RenderableType

    from orchestrator.client.models import AuditEntry, Event, Fleet, Health, Metrics

__all__ = ["events", "status"]

BAR = 30
LAST_EVENTS = 8


@remote(scope="fleet")
async def status(
    session: Session,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between two looks of --watch.")] = 2,
) -> None:
    """Show the fleet: states, boot times, restarts, and the orchestrator's own health."""
    if not watch:
        found = await session.busy(_look(session), "Looking")
        print_json(_plain(found)) if session.json else out.print(_drawn(session, found))
        return
    if session.json or not out.is_terminal:
        while True:
            found = await _look(session)
            print_json_line(_plain(found)) if session.json else out.print(_line(found))
            await asyncio.sleep(interval)
    await _watch(session, interval)


Found = tuple["Fleet", "Metrics", "Health", "list[AuditEntry]"]


async def _look(session: Session, *, happenings: bool = False) -> Found:
    client = session.client
    entries: list[AuditEntry] = []
    fleet, metrics, health = await asyncio.gather(client.status(), client.metrics(), client.health())
    if happenings:
        entries = (await client.audit(limit=LAST_EVENTS, order="desc")).entries
    return fleet, metrics, health, entries


async def _watch(session: Session, interval: float) -> None:
    from orchestrator.client import ClientError, ConnectionFailed

    found = await session.busy(_look(session, happenings=True), "Looking")
    with Live(_drawn(session, found), console=out, screen=True, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(interval)
            note = None
            try:
                found = await _look(session, happenings=True)
            except ConnectionFailed as error:
                note = error.message
            except ClientError as error:
                if error.retry_after_s is None:
                    raise
                note = error.message
            live.update(_drawn(session, found, note), refresh=True)


def _plain(found: Found) -> dict[str, Any]:
    fleet, metrics, health, _ = found
    return {"fleet": fleet, "metrics": metrics, "orchestrator": health}


def _line(found: Found) -> str:
    fleet = found[0]
    counts = ", ".join(f"{count} {name}" for name, count in fleet.by_status.items() if count)
    return f"{state(fleet.health)}: {fleet.total} engines ({counts or 'none'})"


def _drawn(session: Session, found: Found, note: str | None = None) -> RenderableType:
    fleet, metrics, health, entries = found
    head = (
        f"[bold]{escape(session.profile.url)}[/]  orchestrator {health.version} {state(health.status)}"
        f"  fleet {state(fleet.health)}  {fleet.total} engines"
    )
    parts: list[RenderableType] = [head]
    if note:
        parts.append(f"[bold red]{escape(note)}[/]")
    parts += [
        f"[yellow]{escape(name)}: {escape(subsystem.detail)}[/]"
        for name, subsystem in health.subsystems.items()
        if subsystem.status != "ok"
    ]
    states = table("state", "engines", "")
    states.columns[1].justify = "right"
    for name, count in fleet.by_status.items():
        length = 0 if not fleet.total else round(BAR * count / fleet.total)
        styled = state(name).replace(escape(name), "█" * max(length, 1 if count else 0))
        states.add_row(state(name), str(count), styled)
    parts += ["", states, "", _numbers(fleet, metrics)]
    if entries:
        parts += ["", Panel(_happenings(entries), title="last", title_align="left", border_style="dim")]
    return Group(*parts)


def _numbers(fleet: Fleet, metrics: Metrics) -> RenderableType:
    boot = metrics.boot_ms
    shown = table("", "")
    shown.show_header = False
    rows = [
        ("boot", f"p50 {milliseconds(boot.p50)}  p95 {milliseconds(boot.p95)}  p99 {milliseconds(boot.p99)}"),
        (
            "last hour",
            f"{metrics.provisions_1h} provisions  {metrics.crashes_1h} crashes  {metrics.restarts_1h} restarts",
        ),
        ("ever", f"{metrics.total_provisions} provisions  {metrics.total_destroys} destroyed"),
    ]
    if fleet.restarts is not None and fleet.unhealthy_count:
        after = fleet.restarts
        rows.insert(
            0, ("failed", f"{after.pending} restart soon  {after.parked} parked  {after.gave_up} need a person")
        )
    for name, value in rows:
        shown.add_row(f"[dim]{name}[/]", value)
    return shown


def _happenings(entries: list[AuditEntry]) -> RenderableType:
    shown = table("", "", "", "")
    shown.show_header = False
    for entry in reversed(entries):
        shown.add_row(
            f"[dim]{clock(entry.timestamp)}[/]", escape(entry.action), escape(entry.user_id or ""), entry.actor
        )
    return shown


@remote(scope="fleet")
async def events(
    session: Session,
    user: Annotated[str | None, typer.Option("--user", help="Only of this user.")] = None,
    action: Annotated[str | None, typer.Option(help="Only this action, as wake.")] = None,
    last_event_id: Annotated[
        str | None, typer.Option("--last-event-id", help="Go on after this event instead of from now on.")
    ] = None,
) -> None:
    """Show what happens, as it happens, until Ctrl-C. A lost connection is made again where it ended."""
    if err.is_terminal:
        err.print(f"[dim]Events of {escape(session.profile.url)}; Ctrl-C ends.[/]")
    async for event in session.client.events(last_event_id=last_event_id):
        if (user is None or event.user_id == user) and (action is None or event.action == action):
            print_json_line(event) if session.json else out.print(event_line(event), soft_wrap=True)


def event_line(event: Event) -> str:
    became = "" if event.status is None else f" → {state(event.status)}"
    more = " ".join(f"{name}={value}" for name, value in event.metadata.items())
    return (
        f"[dim]{clock(event.timestamp)}[/] [bold]{escape(event.action)}[/] {escape(event.user_id or '')}{became}"
        f" [dim]{escape(more)}[/]"
    ).rstrip()
