"""The command `orchestrator`. One clear line and exit code 1 for whatever a person can mend."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path  # noqa: TC003 - Typer reads the annotations
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from orchestrator import __version__
from orchestrator.cli.reconcile import reconcile
from orchestrator.errors import OrchestratorError

__all__ = ["app", "main"]

app = typer.Typer(
    name="orchestrator",
    help="The control plane for products that give each of their users a process of their own.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
audit_app = typer.Typer(help="The audit log.", no_args_is_help=True)
app.add_typer(audit_app, name="audit")

out = Console()
err = Console(stderr=True)


def main() -> None:
    """Entry point: a known error is one line on stderr and exit code 1, never a traceback."""
    try:
        app()
    except OrchestratorError as error:
        err.print(f"[bold red]error:[/] {_escaped(error.message)}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"engine-orchestrator {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None: ...


@app.command()
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


@app.command()
def serve() -> None:
    """Serve in production, as the ORCH_* variables and .env say."""
    from orchestrator.settings import load_settings

    settings = load_settings()  # first: a bad one is told at once, before everything else is imported
    from orchestrator.logs import configure_logging
    from orchestrator.server import serve as serve_forever

    configure_logging(settings.log_level, settings.log_format)
    serve_forever(settings)


@app.command()
def migrate() -> None:
    """Bring the database to this release's schema."""
    from orchestrator.registry.migrations import migrate as apply
    from orchestrator.settings import load_settings

    settings = load_settings()
    with err.status("Migrating …"):
        before, after = asyncio.run(apply(settings.database_url.get_secret_value()))
    if before == after:
        out.print(f"Nothing to do: the database is at migration {after}.", highlight=False)
    else:
        out.print(f"Migrated from {before or 'nothing'} to {after}.", highlight=False)


@app.command()
def config() -> None:
    """Show the settings in force, secrets masked."""
    from orchestrator.settings import Settings, load_settings

    shown = load_settings().masked()
    if not out.is_terminal:
        for name, value in shown.items():
            typer.echo(f"{name}={value}")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("variable", "in force", "meaning"):
        table.add_column(column, overflow="fold")
    for name, value in shown.items():
        field = Settings.model_fields[name.removeprefix("ORCH_").lower()]
        table.add_row(
            f"[cyan]{name}[/]", _escaped(value) or "[dim]–[/]", f"[dim]{_escaped(field.description or '')}[/]"
        )
    out.print(table)


app.command(name="reconcile")(reconcile)


@audit_app.command()
def verify() -> None:
    """Check every chain of the audit log, its head, and that no row was left out. Exit code 1 when one is broken."""
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
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("chain", "rows", "result"):
        table.add_column(column, overflow="fold")
    for report in reports:
        result = "[green]ok[/]" if report.problem is None else f"[bold red]{_escaped(report.problem)}[/]"
        table.add_row(report.chain, str(report.rows), result)
    out.print(table if reports else "The audit log is empty.")
    if any(report.problem for report in reports):
        raise typer.Exit(1)
