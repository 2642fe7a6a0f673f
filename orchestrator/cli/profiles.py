"""`orchestrator profiles`: the URLs and keys that the command line knows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from orchestrator.cli.exit_codes import ExitCode
from orchestrator.cli.output import err, fail, out, print_json, table
from orchestrator.errors import ConfigurationError

__all__ = ["app"]

app = typer.Typer(
    help="Profiles: URLs and keys of orchestrators, in a file that only you may read.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(help="Name of the profile.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON, for scripts.")]
KeyFile = typer.Option(metavar="FILE", help="A file with the key; - reads it from stdin. Without: you are asked.")


@app.command("list")
def list_profiles(as_json: AsJson = False) -> None:
    """List profiles, without keys."""
    from orchestrator.profiles import Profiles, profiles_path

    found = Profiles.load(profiles_path())
    rows = [
        {
            "name": name,
            "url": profile.url,
            "product": profile.product,
            "platform_key": profile.platform_key is not None,
            "admin_key": profile.admin_key is not None,
            "current": name == found.current,
        }
        for name, profile in sorted(found.profiles.items())
    ]
    if as_json:
        print_json({"profiles": rows, "path": str(found.path)})
    elif not rows:
        err.print("No profiles; make one with: orchestrator profiles add NAME --url URL")
    else:
        shown = table("", "name", "url", "keys", "product")
        for row in rows:
            keys = [kind for kind in ("platform", "admin") if row[f"{kind}_key"]]
            mark = "[green]*[/]" if row["current"] else ""
            name, url, product = (escape(str(row[key] or "")) for key in ("name", "url", "product"))
            shown.add_row(mark, name, url, ", ".join(keys), product)
        out.print(shown)


@app.command()
def add(
    name: Name,
    url: Annotated[str, typer.Option(help="As http://127.0.0.1:8000.")],
    platform_key_file: Annotated[Path | None, KeyFile] = None,
    admin_key_file: Annotated[Path | None, KeyFile] = None,
    product: Annotated[str | None, typer.Option(help="Slug or id that the admin key acts as.")] = None,
) -> None:
    """Add or replace a profile, and use it from now on."""
    from orchestrator.profiles import Profile, Profiles, checked_url, profiles_path

    found = Profiles.load(profiles_path())
    address = checked_url(url)
    keys = [_key("Platform key", platform_key_file), _key("Admin key", admin_key_file)]
    if platform_key_file is None and admin_key_file is None and sys.stdin.isatty():
        for index, what in enumerate(("Platform key", "Admin key")):
            asked = typer.prompt(f"{what} (Enter: none)", default="", hide_input=True, show_default=False, err=True)
            keys[index] = asked.strip() or None
    if not any(keys):
        line = "A profile needs a key: --platform-key-file or --admin-key-file (- reads it from stdin)."
        raise typer.Exit(fail(line, ExitCode.USAGE))
    found.profiles[name] = Profile(address, keys[0], keys[1], product)
    found.current = name
    found.save()
    err.print(f"[green]✓[/] {escape(name)} is the current profile [dim]({escape(str(found.path))})[/]", soft_wrap=True)


def _key(what: str, path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        text = sys.stdin.readline() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{what}: {path} cannot be read ({getattr(error, 'strerror', 'no text')}).") from None
    key = text.strip()
    if not key.isascii() or not key.isprintable() or " " in key or not key:
        raise ConfigurationError(f"{what}: {path} does not hold one key and nothing else.")
    return key


@app.command()
def use(name: Name) -> None:
    """Make a profile the current one."""
    from orchestrator.profiles import Profiles, profiles_path

    found = Profiles.load(profiles_path())
    found.named(name)
    found.current = name
    found.save()
    err.print(f"[green]✓[/] {escape(name)} is the current profile")


@app.command()
def remove(name: Name) -> None:
    """Forget a profile and its keys."""
    from orchestrator.profiles import Profiles, profiles_path

    found = Profiles.load(profiles_path())
    found.named(name)
    del found.profiles[name]
    found.current = None if found.current == name else found.current
    found.save()
    err.print(f"[green]✓[/] {escape(name)} is forgotten")
