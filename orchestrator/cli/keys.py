"""`orchestrator keys`: a product's platform keys, and the re-encryption of engine keys. All need the admin key."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from orchestrator.cli.output import age, ahead, clock, confirmed, err, out, print_json, progress, table
from orchestrator.cli.products import ProductArgument
from orchestrator.cli.session import Session, remote

if TYPE_CHECKING:
    from orchestrator.client.models import IssuedKey

__all__ = ["app"]

app = typer.Typer(help="Platform keys of a product. Needs the admin key.", no_args_is_help=True)


@app.command("list")
@remote(scope="admin")
async def list_keys(session: Session, product: ProductArgument) -> None:
    """List a product's platform keys, without the keys themselves."""
    keys = await session.busy(session.client.platform_keys(await session.product_id(product)), "Listing keys")
    if session.json:
        print_json({"keys": keys})
        return
    if not keys:
        err.print("No keys; make one with: orchestrator keys issue PRODUCT")
        return
    shown = table("id", "scopes", "created", "last used", "expires")
    for key in keys:
        expires = "[dim]never[/]" if key.expires_at is None else clock(key.expires_at)
        shown.add_row(str(key.key_id), ", ".join(key.scopes), age(key.created_at), age(key.last_used_at), expires)
    out.print(shown)


@app.command()
@remote(scope="admin")
async def issue(
    session: Session,
    product: ProductArgument,
    scope: Annotated[list[str], typer.Option(help="read, admit or manage; may be repeated.")] = ["admit"],  # noqa: B006 - Typer copies it
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="As 30d from now, or a date; default: never.")
    ] = None,
) -> None:
    """Issue another platform key. It is shown this once."""
    product_id = await session.product_id(product)
    call = session.client.issue_key(product_id, scopes=scope, expires_at=None if expires is None else ahead(expires))
    _issued(session, await session.busy(call, "Issuing a key"))


@app.command()
@remote(scope="admin")
async def rotate(
    session: Session,
    product: ProductArgument,
    overlap: Annotated[int, typer.Option(min=0, max=86400, help="Seconds that the replaced keys stay valid.")] = 300,
) -> None:
    """Replace a product's platform key. The new one is shown this once."""
    product_id = await session.product_id(product)
    call = session.client.rotate_platform_key(product_id, overlap_seconds=overlap)
    _issued(session, await session.busy(call, "Rotating"))


def _issued(session: Session, key: IssuedKey) -> None:
    if session.json:
        print_json(key)
        return
    expires = "" if key.expires_at is None else f", until {clock(key.expires_at)}"
    out.print(f"[green]✓[/] key {key.key_id} for {', '.join(key.scopes)}{expires}")
    out.print(f"  platform key {key.platform_api_key} [dim](shown only now)[/]", soft_wrap=True)


@app.command()
@remote(scope="admin")
async def revoke(
    session: Session,
    product: ProductArgument,
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="Its id, from `keys list`.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Revoke a platform key at once."""
    product_id = await session.product_id(product)
    confirmed(f"Revoke the key {key_id} of '{product}'. Go on?", yes=yes)
    await session.busy(session.client.revoke_key(product_id, key_id), "Revoking")
    if session.json:
        print_json({"key_id": key_id, "status": "revoked"})
    else:
        out.print(f"[green]✓[/] key {escape(key_id)} is revoked")


@app.command()
@remote(scope="admin")
async def rewrap(
    session: Session,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is done.")] = True,
) -> None:
    """Encrypt all engine keys under the first master key, after ORCH_MASTER_KEY was given a new one."""
    found = await session.busy(session.client.start_rewrap(), "Starting")
    with progress("Encrypting keys") as shown:
        while wait and found.remaining:
            shown.phase = f"{found.done} of {found.total}"
            await asyncio.sleep(0.5)
            found = await session.client.rewrap()
    if session.json:
        print_json(found)
    else:
        out.print(f"{found.status}: {found.done} of {found.total} keys are under the current master key")
