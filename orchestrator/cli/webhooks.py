"""`orchestrator webhooks`: where a product's events are sent."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from orchestrator.cli.output import confirmed, err, out, print_json, state, table
from orchestrator.cli.session import Session, remote

__all__ = ["app"]

app = typer.Typer(help="Webhooks: events sent to a URL of yours.", no_args_is_help=True)

WebhookId = Annotated[str, typer.Argument(metavar="WEBHOOK", help="Its id, from `webhooks list`.")]


@app.command("list")
@remote
async def list_webhooks(session: Session) -> None:
    """List webhooks."""
    hooks = await session.busy(session.client.webhooks(), "Listing webhooks")
    if session.json:
        print_json({"webhooks": [hook.model_dump(mode="json", exclude={"secret"}) for hook in hooks]})
        return
    if not hooks:
        err.print("No webhooks; make one with: orchestrator webhooks add URL")
        return
    shown = table("id", "url", "events")
    for hook in hooks:
        shown.add_row(str(hook.webhook_id), escape(hook.url), escape(", ".join(hook.events) or "all"))
    out.print(shown)


@app.command()
@remote
async def add(
    session: Session,
    url: Annotated[str, typer.Argument(help="Where to send them.")],
    event: Annotated[list[str] | None, typer.Option(help="Only this action; may be repeated.")] = None,
) -> None:
    """Add a webhook. The secret that signs its deliveries is shown this once."""
    made = await session.busy(session.client.create_webhook(url, events=event or []), "Adding")
    if session.json:
        print_json(made)
        return
    out.print(f"[green]✓[/] webhook {made.webhook_id}")
    out.print(f"  secret {made.secret} [dim](shown only now)[/]", soft_wrap=True)


@app.command()
@remote
async def remove(
    session: Session,
    webhook_id: WebhookId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a webhook."""
    confirmed(f"Remove the webhook {webhook_id}. Go on?", yes=yes)
    await session.busy(session.client.delete_webhook(webhook_id), "Removing")
    if session.json:
        print_json({"webhook_id": webhook_id, "status": "removed"})
    else:
        out.print(f"[green]✓[/] webhook {escape(webhook_id)} is removed")


@app.command()
@remote
async def deliveries(session: Session, webhook_id: WebhookId) -> None:
    """Show a webhook's deliveries, also those that failed or were given up."""
    found = await session.busy(session.client.webhook_deliveries(webhook_id), "Reading")
    if session.json:
        print_json({"deliveries": found})
        return
    if not found:
        err.print("No deliveries yet.")
        return
    names = [name for name in type(found[0]).model_fields if name != "webhook_id"]
    shown = table(*names)
    for delivery in found:
        values = delivery.model_dump(mode="json")
        shown.add_row(*(state(str(values[name])) if name == "status" else escape(str(values[name])) for name in names))
    out.print(shown)
