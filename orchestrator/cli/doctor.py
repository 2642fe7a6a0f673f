"""`orchestrator doctor`: is everything here that `serve` needs, and if not, what to do."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.markup import escape

from orchestrator.cli import output
from orchestrator.cli.exit_codes import ExitCode
from orchestrator.cli.output import err, out, print_json, progress
from orchestrator.errors import ConfigurationError

if TYPE_CHECKING:
    from orchestrator.doctor import Finding
    from orchestrator.settings import Settings

__all__ = ["doctor"]

MARKS = {"ok": "[green]✓[/]", "warn": "[yellow]![/]", "fail": "[bold red]✗[/]", "skipped": "[dim]–[/]"}


def doctor(
    dev: Annotated[
        bool, typer.Option("--dev", help="Look at `orchestrator dev` instead of the ORCH_* variables.")
    ] = False,
    state_dir: Annotated[Path | None, typer.Option(help="With --dev: its --state-dir.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, for scripts.")] = False,
) -> None:
    """Check database, migrations, backend, image, network, firewall, ports, clock and permissions.

    Each problem says what to do. Exit code 1 when something fails, 0 with warnings only. Changes nothing.
    """
    output.tell_errors_as_json(as_json)
    settings, problems = _settings(dev, state_dir)
    findings = problems or asyncio.run(_examine(settings, as_json))
    if as_json:
        rows = [
            {"check": one.check, "level": one.level.value, "detail": one.detail, "advice": one.advice}
            for one in findings
        ]
        print_json({"healthy": not _failed(findings), "findings": rows})
    else:
        if problems:
            for finding in problems:
                _show(finding)
        _sum_up(findings)
    if _failed(findings):
        raise typer.Exit(ExitCode.ERROR)


def _failed(findings: list[Finding]) -> int:
    return sum(finding.level == "fail" for finding in findings)


async def _examine(settings: Settings | None, as_json: bool) -> list[Finding]:
    from orchestrator.doctor import examine

    assert settings is not None
    findings = []
    with progress("Examining") as shown:
        async for finding in examine(settings):
            shown.phase = finding.check
            findings.append(finding)
            if not as_json:
                _show(finding)
    return findings


def _show(finding: Finding) -> None:
    mark = MARKS[finding.level.value]
    out.print(f"{mark} [bold]{escape(finding.check):<12}[/] {escape(finding.detail)}", soft_wrap=True)
    if finding.advice:
        out.print(f"  {'':<12} [cyan]→ {escape(finding.advice)}[/]", soft_wrap=True)


def _sum_up(findings: list[Finding]) -> None:
    failed, warned = _failed(findings), sum(finding.level == "warn" for finding in findings)
    if failed:
        err.print(f"\n[bold red]{failed} to mend[/]{f', {warned} to look at' if warned else ''}.")
    elif warned:
        err.print(f"\n[green]It works[/]; [yellow]{warned} to look at[/].")
    else:
        err.print("\n[green]All is well.[/]")


def _settings(dev: bool, state_dir: Path | None) -> tuple[Settings | None, list[Finding]]:
    """The settings, or what is wrong with them."""
    from orchestrator.doctor.checks import fail
    from orchestrator.settings import default_state_dir, load_settings

    directory = state_dir or default_state_dir() / "dev"
    try:
        if dev:
            return load_settings(**_of_dev(directory)), []
        return load_settings(), []
    except ConfigurationError as error:
        advice = "set these variables, or write them to .env; what they mean: orchestrator config --help and the docs"
        if not dev and (directory / "dev.json").exists():
            advice = "set these variables; for a running 'orchestrator dev' use: orchestrator doctor --dev"
        return None, [fail("settings", part, advice) for part in error.message.split("; ")]


def _of_dev(directory: Path) -> dict[str, Any]:
    """The settings of the `dev` that serves from this directory. Raises `ConfigurationError`."""
    from orchestrator.dev import DATABASES

    try:
        told = json.loads((directory / "dev.json").read_text(encoding="utf-8"))
        master_key = (directory / "master_key").read_text(encoding="ascii").strip()
        database = urlsplit(told["database_url"]).path.strip("/")
        backend = next((name for name, known in DATABASES.items() if known == database), "subprocess")
        return {
            "database_url": told["database_url"],
            "admin_key": told["admin_key"],
            "master_key": master_key,
            "engine_backend": backend,
            "data_root": directory,
            "port": urlsplit(told["url"]).port or 0,
        }
    except (OSError, ValueError, KeyError):
        raise ConfigurationError(f"no 'orchestrator dev' serves from {directory}") from None
