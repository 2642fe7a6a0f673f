"""Every command in its place."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from orchestrator import __version__
from orchestrator.cli import audit, engines, keys, products, profiles, server, webhooks
from orchestrator.cli.chat import chat
from orchestrator.cli.completion import completion
from orchestrator.cli.doctor import doctor
from orchestrator.cli.engine import engine_app
from orchestrator.cli.exit_codes import EXIT_CODES_HELP
from orchestrator.cli.fleet import events, status
from orchestrator.cli.output import out
from orchestrator.cli.reconcile import reconcile
from orchestrator.cli.serve import serve

__all__ = ["app"]

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
for command in (server.dev, serve, server.migrate, server.config, doctor, reconcile):
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


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"engine-orchestrator {escape(__version__)}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None: ...
