"""Texts that describe samples, for generators that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from string import Formatter
from typing import Any

from fairdiff_lightning.data.requests import Request, RequestReader
from fairdiff_lightning.data.sample import AttributeSpec


@dataclass(frozen=True)
class Caption:
    """A text for all samples, "Breast, Ultrasound" for example.

    Args:
        text: with ``{attribute}`` where the name of a sample's group goes; "unknown" where it is not known.
        attributes: that may be named.

    Raises:
        ValueError: for a name in braces that is no attribute.
    """

    text: str
    attributes: Sequence[AttributeSpec] = ()

    def __post_init__(self) -> None:
        known = [spec.name for spec in self.attributes]
        named = [name for _, name, _, _ in Formatter().parse(self.text) if name is not None]
        if not set(named) <= set(known):
            raise ValueError(
                f"prompt '{self.text}' names {sorted(set(named) - set(known))}; the samples' `attributes` are {known}."
            )

    def of(self, groups: Mapping[str, int]) -> str:
        """The text of a sample, by the index of its group for each attribute."""
        names = {spec.name: (*spec.groups, "unknown")[groups.get(spec.name, -1)] for spec in self.attributes}
        return self.text.format(**names)

    @property
    def texts(self) -> list[str]:
        """All texts that samples can have."""
        groups = [[*range(len(spec.groups)), -1] for spec in self.attributes]
        names = [spec.name for spec in self.attributes]
        return list(dict.fromkeys(self.of(dict(zip(names, chosen, strict=True))) for chosen in product(*groups)))


@dataclass(frozen=True)
class CaptionReader:
    """Adds to what a generator is given its ``prompt``.

    Args:
        read: what it is given beside.
        caption: the text; a request knows the group of the first attribute alone.
    """

    read: RequestReader
    caption: Caption

    def __call__(self, request: Request) -> Mapping[str, Any]:
        """What ``read`` gives, and ``prompt``."""
        groups = {spec.name: request.group for spec in self.caption.attributes[:1]}
        return {**self.read(request), "prompt": self.caption.of(groups)}
