"""The command `orchestrator`: one file a group of commands, thin over the client.

One clear line and an exit code that means something (`output.ExitCode`) for whatever can go wrong.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape

from orchestrator import __version__
from orchestrator.cli import audit, engines, keys, products, profiles, server, webhooks
from orchestrator.cli.chat import chat
from orchestrator.cli.completion import completion
from orchestrator.cli.doctor import doctor
from orchestrator.cli.engine import engine_app
from orchestrator.cli.fleet import events, status
from orchestrator.cli.output import BY_STATUS, EXIT_CODES_HELP, ExitCode, fail, out
from orchestrator.cli.reconcile import reconcile
from orchestrator.errors import OrchestratorError

__all__ = ["app", "main"]

app = typer.Typer(
    name="orchestrator",
    help="The control plane for products that give each of their users a process of their own.",
    epilog=EXIT_CODES_HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

THIS_HOST = "This host's orchestrator"
for command in (server.dev, server.serve, server.migrate, server.config, doctor, reconcile):
    app.command(rich_help_panel=THIS_HOST)(command)

app.add_typer(engine_app, name="engine", rich_help_panel=THIS_HOST)

FLEET = "The fleet"
app.command(rich_help_panel=FLEET)(status)
app.add_typer(engines.app, name="engines", rich_help_panel=FLEET)
app.command(rich_help_panel=FLEET)(chat)
app.command(rich_help_panel=FLEET)(events)
app.add_typer(audit.app, name="audit", rich_help_panel=FLEET)
app.add_typer(webhooks.app, name="webhooks", rich_help_panel=FLEET)

ADMINISTRATION = "Administration"
app.add_typer(products.app, name="products", rich_help_panel=ADMINISTRATION)
app.add_typer(keys.app, name="keys", rich_help_panel=ADMINISTRATION)

THIS_COMMAND = "This command"
app.add_typer(profiles.app, name="profiles", rich_help_panel=THIS_COMMAND)
app.command(rich_help_panel=THIS_COMMAND)(completion)


def main() -> None:
    """Entry point: what is known to go wrong is one line on stderr and an exit code, never a traceback."""
    try:
        app()
    except OrchestratorError as error:
        sys.exit(fail(error.message, ExitCode.ERROR, name=error.code, details=error.details))
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads on: `orchestrator engines list | head`
        sys.exit(ExitCode.ERROR)
    except Exception as error:
        if (code := _client_error(error)) is None:
            raise
        sys.exit(code)


def _client_error(error: Exception) -> int | None:
    """Tell what the client raised; None for anything else. Imported only now: many commands need no client."""
    from orchestrator.client import ApiError, ClientError, ConnectionFailed, EngineFailure, NotAdmitted

    if not isinstance(error, ClientError):
        return None
    if isinstance(error, ApiError):
        seconds = f" (again in {error.retry_after_s:.0f} s)" if error.retry_after_s else ""
        code = BY_STATUS.get(error.status, ExitCode.ERROR)
        return fail(error.message.rstrip(".") + seconds + ".", code, name=error.code, details=error.details)
    if isinstance(error, ConnectionFailed):
        return fail(error.message, ExitCode.UNAVAILABLE, name="NO_CONNECTION")
    if isinstance(error, NotAdmitted):
        return fail(error.message, ExitCode.CONFLICT, name="NOT_ADMITTED")
    name = error.code if isinstance(error, EngineFailure) else "ERROR"
    return fail(error.message, ExitCode.ERROR, name=name)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"engine-orchestrator {escape(__version__)}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None: ...
