"""Commands that try, prepare or show this host's own orchestrator: they need its settings, not its API."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from orchestrator.cli.output import err, out, print_json, table

__all__ = ["config", "dev", "migrate"]


def dev(
    backend: Annotated[
        Literal["subprocess", "docker"], typer.Option(help="What engines run in: processes or containers.")
    ] = "subprocess",
    once: Annotated[bool, typer.Option("--once", help="Exit after the demonstration.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on.")] = 8000,
    state_dir: Annotated[
        Path | None,
        typer.Option(help="Where the database, keys and engines live."),
    ] = None,
    no_demo: Annotated[bool, typer.Option("--no-demo", help="Only serve.")] = False,
    keep_engines: Annotated[
        bool, typer.Option("--keep-engines", help="Leave engines and database running at the end.")
    ] = False,
) -> None:
    """Everything on this machine: database, backend, engine, a demonstration; then serve until Ctrl-C."""
    from orchestrator.dev import DevOptions, run_dev
    from orchestrator.settings import default_state_dir

    run_dev(
        DevOptions(
            state_dir=(state_dir or default_state_dir() / "dev").expanduser().absolute(),
            backend=backend,
            port=port,
            once=once,
            demo=not no_demo,
            keep_engines=keep_engines,
        ),
        out,
    )


def migrate() -> None:
    """Bring the database to this release's schema."""
    from orchestrator.registry.migrations import migrate as apply
    from orchestrator.settings import load_settings

    settings = load_settings()
    with err.status("Migrating …"):
        before, after = asyncio.run(apply(settings.database_url.get_secret_value()))
    if before == after:
        out.print(f"Nothing to do: the database is at migration {after}.")
    else:
        out.print(f"Migrated from {before or 'nothing'} to {after}.")


def config(as_json: Annotated[bool, typer.Option("--json", help="JSON, for scripts.")] = False) -> None:
    """Show the settings in force, secrets masked."""
    from orchestrator.settings import Settings, load_settings

    shown = load_settings().masked()
    if as_json:
        print_json(shown)
        return
    if not out.is_terminal:
        for name, value in shown.items():
            typer.echo(f"{name}={value}")
        return
    rows = table("variable", "in force", "meaning")
    for name, value in shown.items():
        field = Settings.model_fields[name.removeprefix("ORCH_").lower()]
        rows.add_row(f"[cyan]{name}[/]", escape(value) or "[dim]–[/]", f"[dim]{escape(field.description or '')}[/]")
    out.print(rows)
