"""`orchestrator completion`: the script that completes commands, options and user ids in a shell."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from typer._completion_shared import get_completion_script

from orchestrator.cli.exit_codes import ExitCode
from orchestrator.cli.output import fail

__all__ = ["completion"]


def completion(
    shell: Annotated[
        Literal["bash", "zsh", "fish", "powershell"] | None, typer.Argument(help="Default: the one you are in.")
    ] = None,
) -> None:
    """Print the completion script for a shell; in bash: eval "$(orchestrator completion bash)"."""
    name = shell or _this_shell()
    typer.echo(get_completion_script(prog_name="orchestrator", complete_var="_ORCHESTRATOR_COMPLETE", shell=name))


def _this_shell() -> str:
    import shellingham

    try:
        name = str(shellingham.detect_shell()[0])
    except shellingham.ShellDetectionFailure:
        name = ""
    if name not in ("bash", "zsh", "fish", "powershell"):
        raise typer.Exit(fail("Which shell? Name it: bash, zsh, fish or powershell.", ExitCode.USAGE))
    return name
