"""NVML, opened for a while. It is looked up here and nowhere else; a host without it is no error."""

from __future__ import annotations

from types import TracebackType
from typing import Any

#: The member of ``nvmlValue_t`` that holds a value, by ``nvmlValueType_t``.
_MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")


class NvmlError(Exception):
    """NVML does not tell; the message names the function and says why."""


class NotSupportedError(NvmlError):
    """Not by this board, or not by this driver."""


class Nvml:
    """Is open from being entered until it is left; opens no CUDA context.

    Attributes:
        error: Why it could not be opened, or what failed last; None where nothing did.
    """

    def __init__(self) -> None:
        self._library: Any = None
        self.error: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is an NVML to be asked."""
        return self._library is not None

    def __enter__(self) -> Nvml:
        try:
            import pynvml
        except ImportError as error:
            self.error = str(error)
            return self
        self._library = pynvml
        try:
            self.call("nvmlInit")
        except NvmlError as error:
            self.error = str(error)
            self._library = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ask("nvmlShutdown")
        self._library = None

    def call(self, function: str, *arguments: Any) -> Any:
        """Return what a *function* of NVML says.

        Raises:
            NotSupportedError: There is no such function here, or not for this board.
            NvmlError: It failed in any other way, or NVML is not open.
        """
        if self._library is None:
            raise NvmlError(f"{function}: NVML is not open")
        call = getattr(self._library, function, None)
        if call is None:
            raise NotSupportedError(f"{function}: this nvidia-ml-py is too old for it")
        try:
            return call(*arguments)
        except self._library.NVMLError as error:
            missing = (self._library.NVML_ERROR_NOT_SUPPORTED, self._library.NVML_ERROR_FUNCTION_NOT_FOUND)
            kind = NotSupportedError if error.value in missing else NvmlError
            raise kind(f"{function}: {error}") from error

    def ask(self, function: str, *arguments: Any) -> Any:
        """Return what a *function* of NVML says; None where it fails, or where there is none."""
        try:
            return self.call(function, *arguments)
        except NvmlError as error:
            self.error = str(error)
            return None

    def fields(
        self, handle: Any, *fields: int | tuple[int, int], held_in: str | None = None
    ) -> dict[int, int | float]:
        """Return those of a board's *fields* that it tells, by their ids, all in one call.

        Args:
            handle: The board.
            fields: Their ids, or pairs of an id and a scope: one scope of each id.
            held_in: Only those whose value this member of ``nvmlValue_t`` holds; None for all.
        """
        told: dict[int, int | float] = {}
        for one in self.ask("nvmlDeviceGetFieldValues", handle, fields) or ():
            if one.nvmlReturn:  # each has an error of its own, and then holds anything
                self.error = f"field {one.fieldId}: {self._library.NVMLError(one.nvmlReturn)}"
            elif one.valueType < len(_MEMBERS) and held_in in (None, _MEMBERS[one.valueType]):
                told[one.fieldId] = getattr(one.value, _MEMBERS[one.valueType])
        return told

    def constant(self, name: str) -> Any:
        """Return one of NVML's constants; None where there is no NVML."""
        return getattr(self._library, name, None)
