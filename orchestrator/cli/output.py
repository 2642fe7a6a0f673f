"""What people and scripts see: consoles, tables, progress, JSON, and one line with an exit code for what went wrong."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orchestrator.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["age", "console", "err", "fail", "out", "print_json", "progress", "state", "table"]

QUIET_S = 0.5  # what takes no longer needs no word

STATE_STYLES: Final = {
    "running": "green",
    "sleeping": "blue",
    "stopped": "dim",
    "provisioning": "yellow",
    "failed": "bold red",
    "destroying": "magenta",
    "ok": "green",
    "degraded": "yellow",
    "critical": "bold red",
    "down": "bold red",
}


def console(*, stderr: bool = False) -> Console:
    """With NO_COLOR no colours, and no bold either. What is no terminal is as wide as it needs to be."""
    plain = bool(os.environ.get("NO_COLOR"))
    made = Console(stderr=stderr, color_system=None if plain else "auto", highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = 10_000
    return made


if os.environ.get("NO_COLOR"):
    from typer import rich_utils

    rich_utils.COLOR_SYSTEM = None  # the pages of --help

out = console()
err = console(stderr=True)
as_json = False  # how errors are told; set by the command that runs


def tell_errors_as_json(wanted: bool) -> None:
    global as_json
    as_json = wanted


def fail(message: str, code: int, *, name: str = "ERROR", details: dict[str, Any] | None = None) -> int:
    """One line on stderr; with --json an object. Returns `code`."""
    if as_json:
        body = {"code": name, "message": message} | ({"details": details} if details else {})
        print(json.dumps({"error": body}), file=sys.stderr)
    else:
        err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    return code


def print_json(value: Any) -> None:
    """One document on stdout; a model as the API gives it."""
    typer.echo(json.dumps(_plain(value), ensure_ascii=False, indent=2 if sys.stdout.isatty() else None))


def print_json_line(value: Any) -> None:
    """One line of a stream, at once."""
    sys.stdout.write(json.dumps(_plain(value), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude_unset=True)  # the fields that the API gave
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def table(*columns: str) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def state(status: str) -> str:
    """A state in its colour, as markup."""
    style = STATE_STYLES.get(status)
    return f"[{style}]{escape(status)}[/]" if style else escape(status)


def age(moment: datetime | None) -> str:
    """How long ago, in one unit: `12s`, `5m`, `3h`, `9d`."""
    if moment is None:
        return "[dim]–[/]"
    seconds = max(0, int((datetime.now(UTC) - moment).total_seconds()))
    return duration(seconds)


def duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size * 2:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"


def milliseconds(value: float | None) -> str:
    if value is None:
        return "[dim]–[/]"
    return f"{value:.0f} ms" if value < 1000 else f"{value / 1000:.1f} s"


def clock(moment: datetime) -> str:
    """Local time of day, with the date when it was another day."""
    local = moment.astimezone()
    same_day = local.date() == datetime.now().astimezone().date()
    return local.strftime("%H:%M:%S" if same_day else "%Y-%m-%d %H:%M:%S")


def moment(text: str) -> datetime:
    """`2h`, `30m`, `7d` ago, or an ISO date and time (local where it names no zone). Raises `typer.BadParameter`."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, unit = text[:-1], text[-1:]
    if number.isascii() and number.isdigit() and len(number) < 8 and unit in units:
        return datetime.now(UTC) - timedelta(seconds=int(number) * units[unit])
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"'{text}' is neither like 30m, 2h or 7d nor like 2026-04-27T12:00") from None


def ahead(text: str) -> datetime:
    """As `moment`, with `30d` in the future."""
    past = moment(text)
    return past if not text[:-1].isdigit() else datetime.now(UTC) + (datetime.now(UTC) - past)


def confirmed(question: str, *, yes: bool) -> None:
    """Raises `typer.Exit` unless a person, or --yes, agrees."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.Exit(fail("Nobody is there to confirm it; use --yes.", ExitCode.USAGE, name="NOT_CONFIRMED"))
    if not typer.confirm(question, err=True):
        err.print("Nothing was done.")
        raise typer.Exit(ExitCode.ERROR)


class Progress:
    """The line of a spinner: what is done, in which phase, and for how long."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.phase = ""
        self.began = time.monotonic()

    def __rich__(self) -> str:
        phase = f" [dim]·[/] {escape(self.phase)}" if self.phase else ""
        return f"{escape(self.what)} …{phase} [dim]{time.monotonic() - self.began:.0f} s[/]"


@contextmanager
def progress(what: str) -> Iterator[Progress]:
    """A spinner on the terminal as soon as the block has taken half a second; nothing where nobody looks."""
    shown = Progress(what)
    if not err.is_terminal:
        yield shown
        return
    status = err.status(shown)
    timer = asyncio.get_running_loop().call_later(QUIET_S, status.start)
    try:
        yield shown
    finally:
        timer.cancel()
        status.stop()
