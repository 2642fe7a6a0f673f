"""The blocking client is what the script makes of the one on asyncio, and offers the same calls."""

from __future__ import annotations

import inspect

import pytest

from orchestrator.client import (
    Admission,
    AsyncAdmission,
    AsyncEngine,
    AsyncOrchestratorClient,
    Engine,
    OrchestratorClient,
)
from scripts.client_twins import CLIENT, TWINS, twin


@pytest.mark.parametrize("name", TWINS)
def test_the_twin_is_up_to_date(name: str) -> None:
    wanted = twin((CLIENT / name).read_text(encoding="utf-8"))
    assert (CLIENT / TWINS[name]).read_text(encoding="utf-8") == wanted, "run 'make client'"


@pytest.mark.parametrize("name", TWINS.values())
def test_nothing_of_asyncio_is_left(name: str) -> None:
    code = (CLIENT / name).read_text(encoding="utf-8").partition("\n")[2]
    for word in ("async", "await", "aclose", "__aenter__", "__aiter__"):
        assert word not in code


@pytest.mark.parametrize(
    ("one", "other"),
    [(AsyncOrchestratorClient, OrchestratorClient), (AsyncAdmission, Admission), (AsyncEngine, Engine)],
)
def test_both_offer_the_same(one: type, other: type) -> None:
    def calls(kind: type) -> dict[str, list[str]]:
        public = {name: member for name, member in inspect.getmembers(kind) if not name.startswith("_")}
        return {
            "close" if name == "aclose" else name: list(inspect.signature(member).parameters)
            for name, member in public.items()
            if inspect.isfunction(member)
        }

    assert calls(one) == calls(other)
