"""Imports uvicorn's server without its command line.

`import uvicorn` runs `uvicorn/__init__.py`, which imports click and the reload supervisors: about half of the whole
start of an engine, and never used here. `prepare` puts the package in place without running that file; the server's
own modules are then imported from it as usual. Whoever asks the package for a name that only the file defines makes it
run after all, so nothing is missing for anybody.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any


def prepare() -> None:
    """Does nothing when uvicorn is imported already. Call it from an entry point, not from a module."""
    if "uvicorn" in sys.modules:
        return
    spec = importlib.util.find_spec("uvicorn")
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("uvicorn is not installed")
    package = importlib.util.module_from_spec(spec)
    loader = spec.loader

    def complete(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        del vars(package)["__getattr__"]
        loader.exec_module(package)
        return getattr(package, name)

    sys.modules["uvicorn"] = package
    from uvicorn.config import Config

    # What its other modules import from the package.
    vars(package).update(Config=Config, __getattr__=complete)
