"""NVML, opened for a while. What it does not tell is None, and a host without it is no error."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Nvml:
    """Is open from being entered until it is left; opens no CUDA context.

    Attributes:
        error: What NVML said when it last failed; None where it did not.
    """

    def __init__(self) -> None:
        self._library: Any = None
        self.error: str | None = None

    def __enter__(self) -> Nvml:
        try:
            import pynvml
        except ImportError as error:
            self.error = str(error)
            return self
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            self.error = str(error)
        else:
            self._library = pynvml
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ask("nvmlShutdown")
        self._library = None

    def ask(self, function: str, *arguments: Any) -> Any:
        """Return what a *function* of NVML says; None where it fails, or where there is none."""
        call = getattr(self._library, function, None)  # an old nvidia-ml-py lacks the newest ones
        if call is None:
            return None
        try:
            return call(*arguments)
        except self._library.NVMLError as error:
            self.error = str(error)
            return None

    def constant(self, name: str) -> Any:
        """Return one of NVML's constants; None where there is no NVML."""
        return getattr(self._library, name, None)
