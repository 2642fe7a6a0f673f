"""`orchestrator audit`: read the audit log, follow it, and verify its chain."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from orchestrator.cli.output import clock, err, milliseconds, moment, out, print_json, print_json_line, state, table
from orchestrator.cli.session import Session, remote

if TYPE_CHECKING:
    from orchestrator.client.models import AuditEntry

__all__ = ["app"]

PAGE = 1000  # the most that one call gives
POLL_S = 1.0  # the sequencer needs about as long

User = Annotated[str | None, typer.Option("--user", help="Only of this user.")]
Action = Annotated[str | None, typer.Option("--action", help="Only this action, as wake.")]

app = typer.Typer(help="The audit log. Without a command: its newest entries, the last one below.")


@app.callback(invoke_without_command=True)
@remote(scope="fleet")
async def newest(
    session: Session,
    context: typer.Context,
    user: User = None,
    action: Action = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="As 30m, 2h, 7d ago, or a date and time.")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Before then; the same forms.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, the newest ones.")] = 50,
) -> None:
    entries: list[AuditEntry] = []
    cursor = None
    begin, end = (None if text is None else moment(text) for text in (since, until))
    while len(entries) < limit:
        call = session.client.audit(
            user_id=user,
            action=action,
            since=begin,
            until=end,
            limit=min(PAGE, limit - len(entries)),
            cursor=cursor,
            order="desc",
        )
        page = await session.busy(call, "Reading the audit log")
        entries += page.entries
        cursor = page.next_cursor
        if cursor is None:
            break
    entries.reverse()
    if session.json:
        print_json({"entries": entries})
    elif not entries:
        err.print("No entries.")
    else:
        _show(entries)


def _show(entries: list[AuditEntry]) -> None:
    shown = table("time", "action", "user", "state", "actor", "took", "more")
    for entry in entries:
        shown.add_row(
            f"[dim]{clock(entry.timestamp)}[/]",
            escape(entry.action),
            escape(entry.user_id or "–"),
            state(entry.status or "–"),
            escape(entry.actor),
            milliseconds(entry.duration_ms),
            f"[dim]{escape(_more(entry))}[/]",
        )
    out.print(shown)


def _more(entry: AuditEntry) -> str:
    return " ".join(f"{name}={value}" for name, value in entry.metadata.items())


@app.command()
@remote(scope="fleet")
async def tail(
    session: Session,
    user: User = None,
    action: Action = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, max=PAGE, help="So many to begin with.")] = 10,
) -> None:
    """Show the newest entries, then each new one, until Ctrl-C."""
    last = None
    entries = await session.busy(_after(session, None, max(1, lines), user, action), "Reading the audit log")
    while True:
        for entry in entries if last is not None or lines else []:
            print_json_line(entry) if session.json else out.print(_line(entry), soft_wrap=True)
        last = entries[-1].id if entries else last or 0
        await asyncio.sleep(POLL_S)
        entries = await _after(session, last, PAGE, user, action)


async def _after(
    session: Session, last: int | None, limit: int, user: str | None, action: str | None
) -> list[AuditEntry]:
    """The entries that follow the one with the id `last`, in order; without it the newest `limit`."""
    found: list[AuditEntry] = []
    cursor = None
    while True:
        page = await session.client.audit(
            user_id=user, action=action, limit=min(100, limit), cursor=cursor, order="desc"
        )
        for entry in page.entries:
            if entry.id == last:
                return found[::-1]
            found.append(entry)
        cursor = page.next_cursor
        if cursor is None or (last is None and len(found) >= limit):
            return found[:limit][::-1] if last is None else found[::-1]


def _line(entry: AuditEntry) -> str:
    became = f" → {state(entry.status)}" if entry.status else ""
    took = f" in {milliseconds(entry.duration_ms)}" if entry.duration_ms is not None else ""
    return (
        f"[dim]{clock(entry.timestamp)}[/] [bold]{escape(entry.action)}[/] {escape(entry.user_id or '')}{became}"
        f"{took} [dim]{escape(entry.actor)} {escape(_more(entry))}[/]"
    )


@app.command()
def verify(
    as_json: Annotated[bool, typer.Option("--json", help="JSON, for scripts.")] = False,
) -> None:
    """Check every chain of the audit log, its head, and that no row was left out. Exit code 1 when one is broken.

    Needs the settings of `serve`: it reads the database itself.
    """
    from orchestrator import audit
    from orchestrator.registry import Registry
    from orchestrator.registry.database import Database
    from orchestrator.settings import load_settings

    settings = load_settings()

    async def check() -> list[audit.ChainReport]:
        database = Database(settings.database_url.get_secret_value(), size=2, pooler=settings.database_pooler)
        await database.open()
        try:
            return await audit.verify(Registry(database).audit)
        finally:
            await database.close()

    with err.status("Verifying …"):
        reports = asyncio.run(check())
    if as_json:
        print_json({"chains": [{"chain": one.chain, "rows": one.rows, "problem": one.problem} for one in reports]})
    else:
        shown = table("chain", "rows", "result")
        for report in reports:
            result = "[green]ok[/]" if report.problem is None else f"[bold red]{escape(report.problem)}[/]"
            shown.add_row(report.chain, str(report.rows), result)
        out.print(shown if reports else "The audit log is empty.")
    if any(report.problem for report in reports):
        raise typer.Exit(1)
