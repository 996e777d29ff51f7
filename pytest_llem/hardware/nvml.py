"""Open NVML and call its functions. A host without NVML is not an error."""

from __future__ import annotations

from types import TracebackType
from typing import Any

#: The member of ``nvmlValue_t`` that holds a value, by ``nvmlValueType_t``.
_MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")


class NvmlError(Exception):
    """A call to NVML failed. The message contains the function and the reason."""


class NotSupportedError(NvmlError):
    """The GPU or the driver does not support the call."""


class Nvml:
    """Context manager that opens NVML. It creates no CUDA context, which would take GPU memory.

    Example:
        with Nvml() as nvml:
            count = nvml.ask("nvmlDeviceGetCount")

    Attributes:
        error: Why NVML could not be opened, or the last failure; None if nothing failed.
    """

    def __init__(self) -> None:
        self._library: Any = None
        self.error: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether NVML is open."""
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
        if self.is_open:
            self.ask("nvmlShutdown")
            self._library = None

    def call(self, function: str, *arguments: Any) -> Any:
        """Return the result of a *function* of NVML, given by its name: nvidia-ml-py may not have it.

        Raises:
            NotSupportedError: The library, the driver or the GPU does not support the function.
            NvmlError: The function failed for another reason, or NVML is not open.
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
        """Return the result of a *function* of NVML; None if it fails, with the reason in :attr:`error`."""
        if not self.is_open:  # error says why
            return None
        try:
            return self.call(function, *arguments)
        except NvmlError as error:
            self.error = str(error)
            return None

    def fields(
        self, handle: Any, *fields: int | tuple[int, int], member: str | None = None
    ) -> dict[int, int | float]:
        """Return the available values of some fields of a GPU, by field id, with one call.

        Args:
            handle: NVML's handle of the GPU.
            fields: Field ids, or pairs of an id and a scope. An id may be given only once.
            member: Only values in this member of ``nvmlValue_t``; None for all. Some drivers return another field
                of another type under the same id.
        """
        values: dict[int, int | float] = {}
        for one in self.ask("nvmlDeviceGetFieldValues", handle, fields) or ():
            if one.nvmlReturn:  # each field has its own error code, and no valid value if it is set
                self.error = f"field {one.fieldId}: {self._library.NVMLError(one.nvmlReturn)}"
            # A newer driver may have further types.
            elif one.valueType < len(_MEMBERS) and member in (None, _MEMBERS[one.valueType]):
                values[one.fieldId] = getattr(one.value, _MEMBERS[one.valueType])
        return values

    def constant(self, name: str) -> Any:
        """Return one of NVML's constants; None without NVML, or if nvidia-ml-py is too old for it."""
        return getattr(self._library, name, None)
