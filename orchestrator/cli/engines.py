"""`orchestrator engines`: each call of the API on one engine, and the list of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from orchestrator.cli.exit_codes import ExitCode
from orchestrator.cli.output import (
    age,
    clock,
    confirmed,
    err,
    fail,
    milliseconds,
    out,
    print_json,
    print_json_line,
    state,
    table,
)
from orchestrator.cli.session import Session, UserId, remote

if TYPE_CHECKING:
    from orchestrator.client import AsyncAdmission
    from orchestrator.client.models import ListedEngine, LogLine, Timeline

__all__ = ["app"]

app = typer.Typer(help="Engines: one process for each user.", no_args_is_help=True)

ShowKey = Annotated[bool, typer.Option("--show-key", help="Show the engine's key.")]
STATES = ["provisioning", "running", "sleeping", "stopped", "failed", "destroying"]


def states(incomplete: str) -> list[str]:
    return [name for name in [*STATES, "destroyed"] if name.startswith(incomplete)]


@app.command("list")
@remote(scope="fleet")
async def list_engines(
    session: Session,
    status: Annotated[
        str | None, typer.Option(metavar="STATE", help="Only those in this state.", autocompletion=states)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 1000,
    offset: Annotated[int, typer.Option(min=0, help="After so many.")] = 0,
) -> None:
    """List engines, in order of their creation."""
    engines: list[ListedEngine] = []
    total = 0
    while len(engines) < limit:
        asked = min(1000, limit - len(engines))
        call = session.client.engines(status=status, limit=asked, offset=offset + len(engines))
        page = await session.busy(call, "Listing engines")
        engines += page.engines
        total = page.total
        if len(page.engines) < asked:
            break
    if session.json:
        print_json({"engines": engines, "total": total})
        return
    if not engines:
        err.print("No engines." if total == 0 else f"None of {total} engines here; use a smaller --offset.")
        return
    of_all = any(engine.product_id for engine in engines)
    shown = table("user", "state", "url", "image", "created", "healthy", *(["product"] if of_all else []))
    for engine in engines:
        row = [
            escape(engine.user_id),
            state(engine.status),
            engine.url or "[dim]–[/]",
            escape(engine.engine_version),
            age(engine.created_at),
            age(engine.last_health_at),
        ]
        shown.add_row(*row, *([str(engine.product_id)] if of_all else []))
    out.print(shown)
    if len(engines) < total:
        err.print(f"[dim]{len(engines)} of {total}; go on with --offset {offset + len(engines)}[/]")


@app.command()
@remote
async def show(session: Session, user_id: UserId, show_key: ShowKey = False) -> None:
    """Show one engine."""
    engine = await session.busy(session.client.engine(user_id), "Looking the engine up")
    if session.json:
        print_json(_without_key(engine.model_dump(mode="json", exclude_unset=True), show_key))
        return
    _fields(
        ("user", escape(engine.user_id)),
        ("state", state(engine.status)),
        ("engine", str(engine.engine_id)),
        ("url", engine.url or "[dim]–[/]"),
        ("key", _key(engine.api_key, show_key)),
        ("image", escape(engine.engine_version)),
        ("created", f"{clock(engine.created_at)} [dim]({age(engine.created_at)} ago)[/]"),
        ("healthy", "[dim]never[/]" if engine.last_health_at is None else f"{age(engine.last_health_at)} ago"),
    )


@app.command()
@remote
async def provision(
    session: Session,
    user_id: UserId,
    image: Annotated[str | None, typer.Option(help="Another image than the product's.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="The same key again gives the same engine.")] = None,
    show_key: ShowKey = False,
) -> None:
    """Create a user's engine; ends when it is healthy."""
    call = session.client.provision(user_id, engine_version=image, idempotency_key=idempotency_key)
    engine = await session.busy(call, f"Provisioning {user_id}", user_id)
    if session.json:
        print_json(engine)
        return
    out.print(f"[green]✓[/] {escape(user_id)} is {state(engine.status)} at {engine.url}")
    out.print(f"  key {_key(engine.api_key, show_key)}", soft_wrap=True)


@app.command()
@remote
async def admit(
    session: Session,
    user_id: UserId,
    auto_provision: Annotated[
        bool, typer.Option("--auto-provision", help="Make the engine when there is none.")
    ] = False,
    auto_wake: Annotated[bool, typer.Option("--auto-wake", help="Wake a sleeping, restart a failed engine.")] = False,
    show_key: ShowKey = False,
) -> None:
    """Find, create or wake a user's engine, as a backend does before each request. Exit code 4 when refused."""
    call = session.client.admit(user_id, auto_provision=auto_provision, auto_wake=auto_wake)
    _admitted(session, user_id, await session.busy(call, f"Admitting {user_id}", user_id), show_key)


@app.command()
@remote
async def wake(session: Session, user_id: UserId) -> None:
    """Wake a sleeping engine, or restart a failed one. Exit code 4 when it is neither."""
    call = session.client.admit(user_id, auto_wake=True)
    _admitted(session, user_id, await session.busy(call, f"Waking {user_id}", user_id), False)


def _admitted(session: Session, user_id: str, admission: AsyncAdmission, show_key: bool) -> None:
    info = admission.info
    if session.json:
        engine = None if info is None else info.model_dump(mode="json", exclude_unset=True)
        print_json(
            {"admitted": admission.admitted, "engine": engine}
            | ({} if admission.reason is None else {"reason": admission.reason})
        )
    elif info is not None:
        out.print(f"[green]✓[/] {escape(user_id)} is {state(info.status)} at {info.url}")
        out.print(f"  key {_key(info.api_key, show_key)}", soft_wrap=True)
    else:
        advice = {
            "engine_not_found": "; use --auto-provision",
            "engine_sleeping": "; use --auto-wake",
            "engine_stopped": f"; run: orchestrator engines start {user_id}",
            "engine_unhealthy": f"; run: orchestrator engines recover {user_id}",
        }.get(admission.reason or "", "")
        fail(f"Not admitted: {admission.reason}{advice}.", ExitCode.CONFLICT)
    if info is None:
        raise typer.Exit(ExitCode.CONFLICT)


@app.command()
@remote
async def start(session: Session, user_id: UserId) -> None:
    """Start a stopped, sleeping or failed engine; ends when it is healthy."""
    engine = await session.busy(session.client.start(user_id), f"Starting {user_id}", user_id)
    if session.json:
        print_json(engine)
    else:
        out.print(f"[green]✓[/] {escape(user_id)} is {state(engine.status)} at {engine.url}")


@app.command()
@remote
async def stop(session: Session, user_id: UserId) -> None:
    """Stop an engine, keeping its data. It stays stopped until somebody starts it."""
    _changed(session, user_id, await session.busy(session.client.stop(user_id), f"Stopping {user_id}", user_id))


@app.command()
@remote
async def sleep(session: Session, user_id: UserId) -> None:
    """Put an engine to sleep now: frozen, its memory kept."""
    call = session.client.sleep(user_id)
    _changed(session, user_id, await session.busy(call, f"Putting {user_id} to sleep", user_id))


@app.command()
@remote
async def recover(session: Session, user_id: UserId) -> None:
    """Bring a failed engine up again now."""
    call = session.client.recover(user_id)
    _changed(session, user_id, await session.busy(call, f"Recovering {user_id}", user_id))


def _changed(session: Session, user_id: str, change: Any) -> None:
    if session.json:
        print_json(change)
    else:
        out.print(f"[green]✓[/] {escape(user_id)} is {state(change.status)}")


@app.command("keep-alive")
@remote
async def keep_alive(
    session: Session,
    user_id: UserId,
    seconds: Annotated[int, typer.Argument(min=0, max=86400, help="From now; 0 ends it.")],
) -> None:
    """Keep an engine awake for a while."""
    kept = await session.busy(session.client.keep_alive(user_id, seconds), f"Keeping {user_id} awake")
    if session.json:
        print_json(kept)
    elif kept.keep_alive_until is None:
        out.print(f"[green]✓[/] {escape(user_id)} may sleep when it is idle")
    else:
        out.print(f"[green]✓[/] {escape(user_id)} stays awake until {clock(kept.keep_alive_until)}")


@app.command("rotate-key")
@remote
async def rotate_key(
    session: Session,
    user_id: UserId,
    overlap: Annotated[int, typer.Option(min=0, max=86400, help="Seconds that the old key stays valid.")] = 300,
    show_key: ShowKey = False,
) -> None:
    """Give an engine a new key."""
    call = session.client.rotate_key(user_id, overlap_seconds=overlap)
    rotated = await session.busy(call, f"Rotating the key of {user_id}", user_id)
    if session.json:
        print_json(rotated)
        return
    old = f"the old one is valid for {rotated.overlap_seconds} s" if rotated.overlap_seconds else "the old one is dead"
    restarted = "; the engine was restarted" if rotated.restarted else ""
    out.print(f"[green]✓[/] {escape(user_id)} has a new key; {old}{restarted}")
    out.print(f"  key {_key(rotated.api_key, show_key)}", soft_wrap=True)


@app.command()
@remote
async def destroy(
    session: Session,
    user_id: UserId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    snapshot: Annotated[bool, typer.Option("--snapshot", help="Keep a last snapshot of the data.")] = False,
) -> None:
    """Remove an engine with its data, for good."""
    kept = "with its data; a snapshot is kept" if snapshot else "with all its data; nothing brings it back"
    confirmed(f"Destroy the engine of '{user_id}' {kept}. Go on?", yes=yes)
    call = session.client.destroy(user_id, snapshot=snapshot)
    gone = await session.busy(call, f"Destroying {user_id}", user_id)
    if session.json:
        print_json(gone)
    else:
        out.print(f"[green]✓[/] The engine of {escape(user_id)} is destroyed")


@app.command()
@remote
async def logs(
    session: Session,
    user_id: UserId,
    tail: Annotated[int, typer.Option(min=0, max=10_000, help="So many last lines.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with each new line.")] = False,
) -> None:
    """Show what an engine wrote."""
    if follow:
        async for line in session.client.follow_logs(user_id, tail=tail):
            print_json_line(line) if session.json else _log_line(line)
        return
    lines = await session.busy(session.client.logs(user_id, tail=tail), "Reading the log")
    if session.json:
        print_json({"lines": lines})
        return
    for line in lines:
        _log_line(line)


def _log_line(line: LogLine) -> None:
    shown = Text("" if line.timestamp is None else f"{clock(line.timestamp)} ", style="dim")
    shown.append(line.line, style="red" if line.stream == "stderr" else "default")
    out.print(shown, soft_wrap=True)


@app.command()
@remote
async def timeline(session: Session, user_id: UserId) -> None:
    """Show the phases of an engine's last operation, and where it stalled."""
    found = await session.busy(session.client.timeline(user_id), "Reading the timeline")
    if session.json:
        print_json(found)
    else:
        _timeline(found)


def _timeline(found: Timeline) -> None:
    if found.operation is None:
        err.print("No operation yet.")
        return
    when = "" if found.started_at is None else f" [dim]at {clock(found.started_at)}[/]"
    took = f" in {milliseconds(found.duration_ms)}" if found.duration_ms is not None else " …"
    out.print(f"[bold]{escape(found.operation)}[/] → {state(found.status)}{took}{when}")
    total = max((phase.duration_ms or 0 for phase in found.phases), default=0)
    shown = table("phase", "took", "")
    for phase in found.phases:
        stalled = phase.name == found.stalled_on
        length = 0 if not total else max(1, round(40 * (phase.duration_ms or 0) / total))
        bar = f"[bold red]{'━' * length} failed here[/]" if stalled else f"[cyan]{'━' * length}[/]"
        if phase.duration_ms is None:
            bar = "[yellow]now …[/]"
        shown.add_row(escape(phase.name), milliseconds(phase.duration_ms), bar)
    out.print(shown)
    if found.last_log:
        out.print(f"[dim]last log line:[/] {escape(found.last_log)}", soft_wrap=True)


@app.command()
@remote
async def wait(
    session: Session,
    user_id: UserId,
    status: Annotated[str, typer.Argument(metavar="STATE", help="A state, or destroyed.", autocompletion=states)],
    timeout: Annotated[float, typer.Option(min=0, help="Seconds.")] = 60,
) -> None:
    """Wait until an engine is in a state. Exit code 8 when it is not by then."""
    call = session.client.wait(user_id, status, timeout_s=timeout)
    engine = await session.busy(call, f"Waiting for {user_id} to be {status}", user_id)
    if session.json:
        print_json(_without_key(engine.model_dump(mode="json", exclude_unset=True), False))
    else:
        out.print(f"[green]✓[/] {escape(user_id)} is {state(engine.status)}")


def _fields(*rows: tuple[str, str]) -> None:
    shown = table("", "")
    shown.show_header = False
    for name, value in rows:
        shown.add_row(f"[dim]{name}[/]", value)
    out.print(shown)


def _key(api_key: str | None, show: bool) -> str:
    if api_key is None:
        return "[dim]not for this key[/]"
    return escape(api_key) if show else f"{escape(api_key[:8])}… [dim](--show-key shows it)[/]"


def _without_key(engine: dict[str, Any], show: bool) -> dict[str, Any]:
    return engine if show else {name: value for name, value in engine.items() if name != "api_key"}
