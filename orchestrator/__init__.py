"""engine-orchestrator: the control plane for products that give each of their users a process of their own."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("engine-orchestrator")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["__version__"]
