"""`orchestrator chat`: a conversation with a user's engine in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from orchestrator.cli import output
from orchestrator.cli.exit_codes import ExitCode
from orchestrator.cli.output import err, fail, out, print_json_line
from orchestrator.cli.session import ProfileName, UserId

if TYPE_CHECKING:
    from collections.abc import Iterator

    from orchestrator.client import OrchestratorClient

__all__ = ["chat"]

END = {"/exit", "/quit"}


def chat(
    user_id: UserId,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Say this, show the answer, and end.")] = None,
    task: Annotated[str, typer.Option(help="The conversation to go on with.")] = "chat",
    profile: ProfileName = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every event of a turn as a line of JSON.")] = False,
) -> None:
    """Talk to a user's engine. It is made or woken first. Ctrl-C breaks off an answer, Ctrl-D or /exit ends."""
    from orchestrator.client import OrchestratorClient
    from orchestrator.profiles import find_profile

    output.tell_errors_as_json(as_json)
    found = find_profile(profile)
    if found.platform_key is None:
        line = f"chat needs a platform key, and {found.source} has none: the admin key is never given engine keys."
        raise typer.Exit(fail(line, ExitCode.KEY, name="NO_KEY"))
    with OrchestratorClient(found.url, platform_key=found.platform_key) as client:
        if message is not None:
            _turn(client, user_id, message, task, as_json)
            return
        if sys.stdin.isatty():
            err.print(f"[dim]Talking to the engine of {escape(user_id)}; Ctrl-D or /exit ends.[/]")
            _admit(client, user_id)
        for line in _lines():
            try:
                _turn(client, user_id, line, task, as_json)
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                err.print("\n[dim](broken off; the engine finishes the turn)[/]")


def _lines() -> Iterator[str]:
    """What the person says, line by line, until the end of the input."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 - gives input() its editing and history
    while True:
        try:
            line = input("\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK} " if interactive else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if interactive:
                err.print()
            return
        if line.strip() in END:
            return
        if line.strip():
            yield line


def _admit(client: OrchestratorClient, user_id: str) -> None:
    with err.status(f"Waking the engine of {escape(user_id)} …"):
        client.admit(user_id, auto_provision=True, auto_wake=True)


def _turn(client: OrchestratorClient, user_id: str, message: str, task: str, as_json: bool) -> None:
    """Admit, as before each request to an engine, and one turn."""

    from orchestrator.client import NotAdmitted

    with err.status("…"):
        admission = client.admit(user_id, auto_provision=True, auto_wake=True)
    if admission.reason == "engine_stopped":
        raise NotAdmitted(user_id, f"engine_stopped; run: orchestrator engines start {user_id}")
    usage = ""
    for event in admission.engine.execute(message, task_id=task, silence_s=300):
        if as_json:
            print_json_line({"event": event.type, "data": event.data})
        elif event.text:
            out.print(escape(event.text), end="", soft_wrap=True)
        elif event.type == "usage":
            counts = (event.data.get(name) for name in ("input_tokens", "output_tokens"))
            usage = "{} tokens in, {} out".format(*counts)
    if not as_json:
        out.print()
        if usage and err.is_terminal:
            err.print(f"[dim]{usage}[/]")
