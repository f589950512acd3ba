"""Fair and data-efficient medical image segmentation with PyTorch Lightning."""

from fairdiff_lightning.version import __version__
