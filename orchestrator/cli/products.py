"""`orchestrator products`: onboarding, policies, and the end of a product. All need the admin key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from orchestrator.cli.output import confirmed, err, out, print_json, table
from orchestrator.cli.session import Session, remote

__all__ = ["ProductArgument", "app"]

app = typer.Typer(
    help="Products: the tenants, each a backend with many users. Needs the admin key.", no_args_is_help=True
)

ProductArgument = Annotated[str, typer.Argument(metavar="PRODUCT", help="Its slug or id.")]
PolicyText = Annotated[
    str | None, typer.Option("--policy", metavar="JSON|@FILE", help="The whole policy: '{\"max_engines\": 100}'.")
]


def policy_of(text: str | None) -> dict[str, Any]:
    """Raises `typer.BadParameter`."""
    if text is None:
        return {}
    try:
        policy = json.loads(Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text)
    except OSError as error:
        raise typer.BadParameter(f"--policy: {text[1:]} cannot be read ({error.strerror})") from None
    except ValueError:
        raise typer.BadParameter("--policy: not JSON") from None
    if not isinstance(policy, dict):
        raise typer.BadParameter("--policy: must be a JSON object")
    return policy


@app.command("list")
@remote(scope="admin")
async def list_products(session: Session) -> None:
    """List products."""
    products = await session.busy(session.client.products(), "Listing products")
    if session.json:
        print_json({"products": products})
        return
    if not products:
        err.print("No products; make one with: orchestrator products register SLUG")
        return
    shown = table("slug", "name", "engines", "id", "policy")
    for product in products:
        shown.add_row(
            escape(product.slug),
            escape(product.display_name),
            str(product.engines),
            str(product.product_id),
            f"[dim]{escape(json.dumps(product.policy))}[/]",
        )
    out.print(shown)


@app.command()
@remote(scope="admin")
async def register(
    session: Session,
    slug: Annotated[str, typer.Argument(help="Short name: a-z, 0-9 and -.")],
    name: Annotated[str | None, typer.Option(help="For people; default: the slug.")] = None,
    policy: PolicyText = None,
) -> None:
    """Onboard a product. Its platform key is shown this once."""
    call = session.client.register_product(slug, name or slug, policy=policy_of(policy))
    made = await session.busy(call, f"Registering {slug}")
    if session.json:
        print_json(made)
        return
    out.print(f"[green]✓[/] {escape(slug)} is product {made.product_id}")
    out.print(f"  platform key {made.platform_api_key} [dim](shown only now)[/]", soft_wrap=True)


@app.command()
@remote(scope="admin")
async def policy(session: Session, product: ProductArgument, policy: PolicyText = None) -> None:
    """Show a product's policy, or replace it whole with --policy."""
    product_id = await session.product_id(product)
    if policy is None:
        found = [
            one for one in await session.busy(session.client.products(), "Reading") if one.product_id == product_id
        ]
        in_force = found[0].policy if found else {}
    else:
        call = session.client.replace_policy(product_id, policy_of(policy))
        in_force = await session.busy(call, "Replacing the policy")
    if session.json:
        print_json({"policy": in_force})
    elif not in_force:
        out.print("No limits.")
    else:
        shown = table("key", "value")
        for key, value in in_force.items():
            shown.add_row(key, escape(json.dumps(value)))
        out.print(shown)


@app.command()
@remote(scope="admin")
async def delete(
    session: Session,
    product: ProductArgument,
    force: Annotated[bool, typer.Option("--force", help="With all its engines and their data.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a product; with engines it needs --force."""
    product_id = await session.product_id(product)
    what = "with all its engines and their data; nothing brings them back" if force else "and its keys"
    confirmed(f"Delete the product '{product}' {what}. Go on?", yes=yes)
    gone = await session.busy(session.client.delete_product(product_id, force=force), f"Deleting {product}")
    if session.json:
        print_json(gone)
    elif gone.status == "deleted":
        out.print(f"[green]✓[/] {escape(product)} is deleted")
    else:
        out.print(f"[yellow]…[/] {escape(product)} is being deleted; its engines are still being destroyed")
