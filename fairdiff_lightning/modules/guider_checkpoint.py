"""The guider of a finished first stage, read for the target that is trained beside it (PIG)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fairdiff_lightning.modules.paired_noise import training_noise
from fairdiff_lightning.networks.checkpoint import read_checkpoint, read_state_dict

FACTS = ("scheduler", "scheduler_args", "num_classes", "ordinal_mask", "in_channels", "image_size")
"""What a guider must have in common with the target: none of them shows in the shapes of its weights alone."""


def read_guider(path: str, wanted: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the guider of a checkpoint that ``stage="guider"`` wrote.

    Args:
        path: of the checkpoint.
        wanted: hyperparameters of the module that takes it over; facts that the checkpoint does not tell are not
            compared.

    Returns:
        The guider's weights, and the whole checkpoint.

    Raises:
        ValueError: when it holds no guider, or one of another noise, encoding of masks or image size.
    """
    state = {k.removeprefix("guider."): w for k, w in read_state_dict(path).items() if k.startswith("guider.")}
    if not state:
        raise ValueError(f"guider_checkpoint='{path}' holds no guider; expected is a checkpoint of stage='guider'.")
    checkpoint = read_checkpoint(Path(path))
    saved = {**wanted, **checkpoint.get("hyper_parameters", {})}
    for fact in FACTS:
        if _comparable(fact, saved) != _comparable(fact, wanted):
            raise ValueError(
                f"guider_checkpoint='{path}': its {fact} is {saved[fact]}, here it is {wanted[fact]}. Train the target "
                "with the guider's settings, or a guider with the target's."
            )
    return state, checkpoint


def _comparable(fact: str, hparams: Mapping[str, Any]) -> Any:
    """A side as height and width, and the noise as its scheduler was built, whether its arguments were given or not."""
    value = hparams[fact]
    if fact == "image_size":
        return (value, value) if isinstance(value, int) else tuple(value)
    if fact == "scheduler_args":
        return json.loads(training_noise(hparams).to_json_string())
    return value
