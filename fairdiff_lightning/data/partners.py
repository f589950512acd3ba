"""Synthetic partners of real training samples, as loaders draw them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fairdiff_lightning.data.cache import Arrays
from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.frames import Frame
from fairdiff_lightning.data.native import NativeDataset, Record
from fairdiff_lightning.data.patch_merge import PartnerIndex

UNLIKE = 0.25
"""Share of the foreground in which a partner's mask may differ, as it does when it is resized twice."""


def find_partners(real: Sequence[Record], made: Sequence[Record], num_synthetic: int, seed: int) -> PartnerIndex:
    """The synthetic samples that were made from each real one, by its id.

    Raises:
        ValueError: when there are none at all, but some are asked for; see also :class:`PartnerIndex`.
    """
    if not made and num_synthetic:
        raise ValueError(
            "merge: there are no synthetic samples to merge with. Name their folders in `synthetic`, or set "
            "num_synthetic=0 to train on real samples alone."
        )
    return PartnerIndex(real, made, num_synthetic, seed)


def read_partner(
    index: PartnerIndex, record: Record, turn: Sequence[int], real: Arrays, dataset: NativeDataset, frame: Frame
) -> Arrays:
    """Decode a real sample's partner at its turn; one without any is its own.

    Args:
        index: knows the partners.
        record: of the real sample.
        turn: epoch, and how often it has shown the sample before.
        real: its arrays, image and mask first.
        dataset: reads the partner.
        frame: what of it is given.

    Raises:
        InvalidSampleError: for a partner of another size or another mask, which the real sample's mask would not fit.
    """
    partner = index.draw(record, *turn)
    if partner is None:
        return real
    found = frame.decode(dataset, partner)
    expected = f"the mask of '{record.id}'; generate for masks='train' and at the size that is trained on"
    if found[1].shape != real[1].shape:
        raise InvalidSampleError(f"{partner.files}", f"size {found[1].shape}", f"{real[1].shape} and {expected}")
    differing, foreground = np.count_nonzero(found[1] != real[1]), np.count_nonzero(found[1] | real[1])
    if differing > UNLIKE * foreground:
        raise InvalidSampleError(
            f"{partner.files}", f"another mask in {differing} of {foreground} voxels of the foreground", expected
        )
    return found
