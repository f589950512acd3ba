"""What a data module knows of its data and a module is built from."""

from __future__ import annotations

from fairdiff_lightning.data.frames import Frame
from fairdiff_lightning.data.native import NativeDataset
from fairdiff_lightning.data.sample import AttributeSpec


class ModuleFacts:
    """Facts of a data module, by its data set, its frame and the attributes that samples carry."""

    dataset: NativeDataset
    frame: Frame
    attribute_specs: list[AttributeSpec]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, background first."""
        return self.dataset.classes

    @property
    def num_classes(self) -> int:
        """Number of classes, the background included."""
        return len(self.dataset.classes)

    @property
    def in_channels(self) -> int:
        """Channels of the image."""
        return self.dataset.channels

    @property
    def image_size(self) -> tuple[int, ...] | None:
        """Sides of a sample; None where each has its own."""
        return self.frame.size

    @property
    def intensity_range(self) -> tuple[float, float]:
        """Smallest and largest value of the image."""
        return (0.0, 1.0)

    @property
    def attribute_groups(self) -> dict[str, list[str]]:
        """Attribute -> names of its groups, in the order of their indices."""
        return {spec.name: list(spec.groups) for spec in self.attribute_specs}

    @property
    def num_groups(self) -> dict[str, int]:
        """Attribute -> number of its groups."""
        return {spec.name: len(spec) for spec in self.attribute_specs}
