"""`orchestrator engine …`: for those who write engines."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orchestrator.errors import ConfigurationError

__all__ = ["engine_app"]

engine_app = typer.Typer(help="For those who write engines.", no_args_is_help=True)

_COLOURS = {"holds": "green", "fails": "bold red", "not offered": "dim", "not tested": "yellow"}


@engine_app.callback()
def _root() -> None: ...


@engine_app.command()
def check(
    url: Annotated[str | None, typer.Argument(help="Where the engine listens, e.g. http://127.0.0.1:9001.")] = None,
    key: Annotated[
        str | None,
        typer.Option(envvar="ENGINE_API_KEY", show_envvar=True, help="Its key; '-' reads it from standard input."),
    ] = None,
    command: Annotated[
        str | None, typer.Option(help="Start an engine by this command and put it through everything.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The findings as JSON.")] = False,
) -> None:
    """Does an engine keep its contract? Exit code 1 when something that must hold does not."""
    from orchestrator.engine_check import check_command, check_url, holds

    if (url is None) == (command is None):
        raise ConfigurationError("Give the URL of a running engine, or --command to start one; not both.")
    if url is not None:
        given = sys.stdin.readline().strip() if key == "-" else key
        if not given:
            raise ConfigurationError("The engine's key is missing: give it by --key or ENGINE_API_KEY.")
        if not given.isascii() or not given.isprintable():
            raise ConfigurationError("The engine's key must be printable ASCII.")
        findings = check_url(url, given)
    else:
        findings = check_command(command or "")
    passed = holds(findings)
    if as_json:
        typer.echo(json.dumps({"holds": passed, "findings": [finding.as_json() for finding in findings]}, indent=2))
    else:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("check", "rule", "result", "seen"):
            table.add_column(column, overflow="fold")
        for finding in findings:
            colour = _COLOURS[finding.result]
            table.add_row(finding.check, finding.rule, f"[{colour}]{finding.result}[/]", escape(finding.detail))
        out = Console()
        out.print(table)
        out.print(
            "[green]This engine keeps the contract.[/]" if passed else "[bold red]It does not keep the contract.[/]"
        )
    if not passed:
        raise typer.Exit(1)
