"""Check a loaded model: transformers also loads models that cannot be measured, and warns at most."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from pytest_llem.engines.protocol import PreflightError
from pytest_llem.engines.pytorch.placement import input_device
from pytest_llem.study.problems import did_you_mean

#: Accepted relative difference, due to rounding, of a token's logits when only later tokens differ.
CAUSAL_TOLERANCE = 1e-3


def check_weights(name: str, model: Any, found: Mapping[str, Collection[Any]]) -> None:
    """Check that the weights of *model* are from its files: transformers initialises missing ones at random.

    Warns of missing and of unused weights. If some are missing, the model is marked as having random weights.

    Args:
        name: The model's name in the study.
        model: The loaded model.
        found: transformers' loading info.

    Raises:
        PreflightError: None of its weights is in the files, or some have another shape.
    """
    architecture = type(model).__name__
    if mismatched := sorted(found["mismatched_keys"]):
        weight, given, expected = mismatched[0]
        raise PreflightError(
            f"model {name!r} cannot be loaded: its files have {_count(mismatched)} of another shape than "
            f"config.json: {weight} is {_shape(given)} and not {_shape(expected)}"
        )
    missing, unused = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    parameters = {parameter for parameter, _ in model.named_parameters()}
    if parameters and parameters <= set(missing):
        held = f", which hold {_some(unused)}" if unused else ""
        raise PreflightError(
            f"model {name!r} cannot be loaded: none of the {len(parameters)} weights of {architecture} is in its "
            f"files{held}: check that config.json names the architecture of the weights in them"
        )
    if missing:
        model.config.random_weights = True
        warnings.warn(
            f"the files of model {name!r} are missing {_count(missing)} of {architecture}, now random: "
            f"{_some(missing)}",
            stacklevel=2,
        )
    if unused:
        warnings.warn(
            f"the files of model {name!r} have {_count(unused)} that {architecture} does not use: {_some(unused)}",
            stacklevel=2,
        )


def _count(weights: Sequence[Any]) -> str:
    return f"{len(weights)} weight{'s' * (len(weights) > 1)}"


def _some(weights: Sequence[str]) -> str:
    more = f" and {len(weights) - 3} more" if len(weights) > 3 else ""
    return ", ".join(weights[:3]) + more


def _shape(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))


def check_causal(name: str, model: Any) -> None:
    """Check that no token of *model* depends on later ones: transformers also loads encoders, with a warning.

    If neither the configuration nor a layer says that the model is causal, two prompts that differ in their last
    token are run. This is needed for GPT-NeoX models, which are decoders and do not say so.

    Raises:
        PreflightError: The model is an encoder.
    """
    config = model.config
    is_decoder = getattr(config, "is_decoder", getattr(config, "causal", True))  # "causal" is XLM's name for it
    if is_decoder or any(getattr(module, "is_causal", False) for module in model.modules()):
        return
    try:
        prompts = torch.tensor([[5, 6], [5, 7]], device=input_device(model))
        with torch.inference_mode():
            first, second = model(input_ids=prompts).logits[:, 0].float()
    except Exception:  # a model may have code of its own; an error will be reported when it generates
        return
    if (first - second).abs().max() > CAUSAL_TOLERANCE * first.abs().max():
        raise PreflightError(
            f"model {name!r} is an encoder ({type(model).__name__}), whose tokens depend on later ones: name a "
            "decoder, or set is_decoder: true in its config.json if it was trained as one"
        )


def check_modules(model: Any, places: Mapping[str, int | str], section: str) -> None:
    """Check that *model* has the modules that *places* names: transformers ignores unknown ones.

    Args:
        model: The loaded model.
        places: Devices by module, from ``device_map``.
        section: Section of ``device_map`` in the study, for messages.

    Raises:
        PreflightError: The model has no module of that name.
    """
    known = (*dict(model.named_modules()), *dict(model.named_parameters()))
    for name in places:
        if name not in known:
            hint = did_you_mean(name, known)
            raise PreflightError(f"{section}.device_map: {type(model).__name__} has no module {name!r}{hint}")
