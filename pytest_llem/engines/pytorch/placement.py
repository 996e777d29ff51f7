"""Find the devices that a transformers model may use, and those that it is on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from pytest_llem.engines.library_errors import one_line
from pytest_llem.engines.protocol import PreflightError
from pytest_llem.study.engines import PyTorchConfig

#: Values of ``device_map`` for which accelerate computes the map. Any other text names a device.
COMPUTED_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def possible_gpus(options: PyTorchConfig, section: str) -> list[int]:
    """Return the indices of the GPUs that the model may use. Meters need them before it is loaded.

    Args:
        options: Options of the engine.
        section: Their section in the study, for messages.

    Raises:
        PreflightError: An option names a device that does not exist.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.device_map is None:
        return [0] if count else []
    placed = device_map(options)
    mapped = _gpus(f"{section}.device_map", placed.values(), count) if isinstance(placed, dict) else None
    allowed = _gpus(f"{section}.max_memory", map(device_id, options.max_memory or ()), count)
    if mapped is not None:
        return mapped
    return allowed if options.max_memory else list(range(count))


def _gpus(field: str, places: Iterable[Any], count: int) -> list[int]:
    """Return the indices of the GPUs among *places*, in order."""
    return sorted({index for place in places if (index := _gpu(field, place, count)) is not None})


def _gpu(field: str, place: Any, count: int) -> int | None:
    """Return the index of the GPU that *place* names; None if it names another kind of device."""
    if place == "disk":
        return None
    try:
        device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    except RuntimeError as error:
        raise PreflightError(f"{field}: {one_line(error)}") from error
    index = (device.index or 0) if device.type == "cuda" else None
    if index is not None and index >= count:
        raise PreflightError(f"{field}: there is no GPU {index} ({count} visible)")
    return index


def used_gpus(model: Any) -> list[int]:
    """Return the indices of the GPUs that *model* is on."""
    # Offloaded parameters do not show where they are used: the device map does.
    placed = getattr(model, "hf_device_map", None) or {}
    places = placed.values() if placed else {parameter.device for parameter in model.parameters()}
    devices = [place if isinstance(place, int) else str(place) for place in places]
    return sorted(
        {
            place if isinstance(place, int) else torch.device(place).index or 0
            for place in devices
            if isinstance(place, int) or place.startswith("cuda")
        }
    )


def input_device(model: Any) -> torch.device:
    """Return the device on which *model* expects its input ids."""
    embeddings = model.get_input_embeddings()
    device: torch.device = embeddings.weight.device
    if device.type == "meta":  # offloaded: accelerate moves it to its device while it runs
        place = embeddings._hf_hook.execution_device
        device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    return device


def device_map(options: PyTorchConfig) -> Any:
    """Return the device map in accelerate's form: a value of COMPUTED_MAPS, or a mapping."""
    given = options.device_map
    if isinstance(given, dict):
        return {module: device_id(place) for module, place in given.items()}
    return given if given in COMPUTED_MAPS else {"": device_id(str(given))}


def device_id(place: int | str) -> int | str:
    """Return *place* as accelerate takes it: a GPU by its index, also if that was given as text."""
    return int(place) if isinstance(place, str) and place.isdecimal() else place
