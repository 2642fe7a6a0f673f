"""`orchestrator reconcile`: the registry against the backend, now, and as a table."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from orchestrator.loops.reconcile import Step
    from orchestrator.settings import Settings

__all__ = ["reconcile"]

out = Console()
err = Console(stderr=True)

WAIT_S = 120.0  # for what was begun; what is not over by then is gone on with by the next `serve`


def reconcile(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    purge: Annotated[
        bool, typer.Option("--purge", help="Also remove objects that nothing explains, with their data.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before data is removed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as JSON.")] = False,
) -> None:
    """Hold the registry against what really runs here, and repair the differences.

    Needs the settings of `serve`, and runs beside it: an engine that somebody is at is left to him.
    """
    from orchestrator.logs import configure_logging
    from orchestrator.settings import load_settings

    settings = load_settings()
    configure_logging("warning", settings.log_format)
    asyncio.run(_reconcile(settings, dry_run=dry_run, purge=purge, yes=yes, as_json=as_json))


async def _reconcile(settings: Settings, *, dry_run: bool, purge: bool, yes: bool, as_json: bool) -> None:
    from orchestrator.control_plane import ControlPlane
    from orchestrator.loops.reconcile import Action, apply, plan

    plane = ControlPlane(settings)
    try:
        with err.status("Comparing …"):
            await plane.open(loops=False)
            steps = await plan(plane.means, purge=purge)
        _show(steps, as_json=as_json)
        if dry_run or not steps:
            return
        purged = sum(step.action is Action.PURGE_ORPHAN for step in steps)
        if purged and not yes:
            question = f"Remove {purged} object(s) with all their data? Nothing brings it back."
            await asyncio.to_thread(typer.confirm, question, abort=True, err=True)
        with err.status(f"Working on {len(steps)} difference(s) …"):
            await apply(plane.means, plane.healing, steps, actor="operator")
            await plane.flights.drain(WAIT_S)
    finally:
        await plane.close()
    if not as_json:
        out.print(f"Done: {len(steps)} difference(s).", highlight=False)


def _show(steps: list[Step], *, as_json: bool) -> None:
    if as_json:
        rows = [
            {
                "engine_id": str(step.engine_id),
                "user_id": step.user_id,
                "expected": step.expected,
                "found": None if step.found is None else step.found.value,
                "action": step.action.value,
            }
            for step in steps
        ]
        typer.echo(json.dumps({"differences": rows}))
        return
    if not steps:
        out.print("Nothing to do: the registry and the backend agree.", highlight=False)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("engine", "user", "registry", "found", "to do"):
        table.add_column(column, overflow="fold")
    for step in steps:
        table.add_row(
            str(step.engine_id),
            step.user_id or "[dim]–[/]",
            step.expected or "[dim]no engine[/]",
            "[dim]nothing[/]" if step.found is None else step.found.value,
            step.action.value,
        )
    out.print(table)
