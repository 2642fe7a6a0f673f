"""Commands that talk to an orchestrator: their common options, the client, and how their errors end."""

from __future__ import annotations

import asyncio
import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints
from uuid import UUID

import typer

from orchestrator.cli import output
from orchestrator.cli.exit_codes import ExitCode
from orchestrator.cli.output import fail, progress

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from orchestrator.client import AsyncOrchestratorClient
    from orchestrator.profiles import Profile

__all__ = ["Session", "remote", "user_ids"]

T = TypeVar("T")

POLL_S = 0.5  # how often the phase of an operation is looked at

ProfileName = Annotated[
    str | None, typer.Option("--profile", metavar="NAME", help="A profile other than the current one.")
]
ProductName = Annotated[
    str | None, typer.Option("--product", metavar="SLUG|ID", help="Act as this product, with the admin key.")
]
AllProducts = Annotated[bool, typer.Option("--all-products", help="Of all products, with the admin key.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON, for scripts.")]


@dataclass
class Session:
    """One command's connection."""

    client: AsyncOrchestratorClient
    profile: Profile
    json: bool

    async def busy(self, work: Awaitable[T], what: str, user_id: str | None = None) -> T:
        """The result of `work`; a person sees what it waits for, with the phase of that user's engine."""
        with progress(what) as shown:
            watching = asyncio.create_task(self._watch(user_id, shown)) if user_id and output.err.is_terminal else None
            try:
                return await work
            finally:
                if watching is not None:
                    watching.cancel()
                    await asyncio.gather(watching, return_exceptions=True)

    async def _watch(self, user_id: str, shown: output.Progress) -> None:
        from orchestrator.client import ClientError

        while True:
            await asyncio.sleep(POLL_S)
            try:
                shown.phase = await self._phase(user_id)
            except ClientError:
                shown.phase = ""  # an ornament; the work itself says what is wrong

    async def _phase(self, user_id: str) -> str:
        from orchestrator.client.errors import EngineNotFound, NotFound, PolicyDenied

        try:
            timeline = await self.client.timeline(user_id)
        except (NotFound, EngineNotFound, PolicyDenied):
            return (await self.client.engine(user_id)).status
        if timeline.status not in ("provisioning", "destroying") and timeline.stalled_on is None:
            return timeline.status
        detail = timeline.last_log if timeline.stalled_on == "pull" else None
        return " · ".join(filter(None, (timeline.operation, timeline.stalled_on, detail)))

    async def product_id(self, name: str) -> UUID:
        """The id of a product by slug or id. Needs the admin key."""
        try:
            return UUID(name)
        except ValueError:
            pass
        for product in await self.client.products():
            if product.slug == name:
                return product.product_id
        raise typer.Exit(fail(f"No product '{name}'.", ExitCode.NOT_FOUND, name="PRODUCT_NOT_FOUND"))


def remote(function: Callable[..., Awaitable[None]] | None = None, *, scope: str = "product") -> Callable[..., Any]:
    """A command from `async def command(session, …)`: with --json and --profile, and, by `scope`,

    - `product`: with --product; acts for one product;
    - `fleet`: with --product and --all-products;
    - `admin`: needs the admin key.
    """
    if function is None:
        return functools.partial(remote, scope=scope)

    hints = get_type_hints(function, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in list(inspect.signature(function).parameters.items())[1:]
    ]
    common: dict[str, Any] = {"profile": ProfileName, "as_json": AsJson}
    if scope in ("product", "fleet"):
        common["product"] = ProductName
    if scope == "fleet":
        common["all_products"] = AllProducts
    defaults = {"as_json": False, "all_products": False}
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name), annotation=annotation)
        for name, annotation in common.items()
    ]

    @functools.wraps(function)
    def command(**arguments: Any) -> None:
        context = arguments.get("context")
        if context is not None and context.invoked_subcommand is not None:
            return  # a group that is also a command
        options = {name: arguments.pop(name) for name in common}
        output.tell_errors_as_json(options["as_json"])
        asyncio.run(_run(function, scope, options, arguments))

    command.__signature__ = inspect.Signature(own + added)  # type: ignore[attr-defined]  # read by inspect, and so by Typer
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in own + added}
    del command.__wrapped__  # its signature is another one
    return command


async def _run(
    function: Callable[..., Awaitable[None]], scope: str, options: dict[str, Any], arguments: dict[str, Any]
) -> None:
    from orchestrator.client import AsyncOrchestratorClient
    from orchestrator.profiles import find_profile

    profile = find_profile(options["profile"])
    product = options.get("product")
    everything = options.get("all_products", False)
    acting = product or (None if profile.platform_key or everything else profile.product)
    as_admin = scope == "admin" or everything or acting is not None
    if as_admin and profile.admin_key is None:
        raise typer.Exit(fail(f"This needs the admin key, and {profile.source} has none.", ExitCode.KEY, name="NO_KEY"))
    if scope == "product" and acting is None and profile.platform_key is None:
        line = "Which product? Name it with --product, or use a platform key."
        raise typer.Exit(fail(line, ExitCode.USAGE, name="NO_PRODUCT"))
    product_id = None if acting is None else await _product_id(profile, acting)
    async with AsyncOrchestratorClient(
        profile.url,
        platform_key=None if as_admin else profile.platform_key,
        admin_key=profile.admin_key,
        product_id=product_id,
    ) as client:
        await function(Session(client, profile, options["as_json"]), **arguments)


async def _product_id(profile: Profile, name: str) -> UUID:
    from orchestrator.client import AsyncOrchestratorClient

    async with AsyncOrchestratorClient(profile.url, admin_key=profile.admin_key) as client:
        return await Session(client, profile, False).product_id(name)


def user_ids(incomplete: str) -> list[str]:
    """Completion of a user id in the shell: what the orchestrator knows, or nothing."""
    from orchestrator.client import OrchestratorClient, Retries
    from orchestrator.profiles import find_profile

    try:
        profile = find_profile()
        with OrchestratorClient(
            profile.url,
            platform_key=profile.platform_key,
            admin_key=profile.admin_key,
            timeout_s=2,
            retries=Retries(attempts=1),
        ) as client:
            listed = client.engines(limit=1000).engines
    except Exception:  # noqa: BLE001 - a shell that completes shows no errors
        return []
    return sorted(engine.user_id for engine in listed if engine.user_id.startswith(incomplete))


UserId = Annotated[str, typer.Argument(metavar="USER", help="Whose engine.", autocompletion=user_ids)]
