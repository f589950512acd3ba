"""One frame of a DICOM file, windowed to 8 bits; the other frames of a volume are never decoded."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_rescale, apply_voi_lut
from pydicom.pixels.utils import pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import BreastTomosynthesisImageStorage, ExplicitVRLittleEndian, generate_uid

from fairdiff_lightning.data.errors import InvalidSampleError
from fairdiff_lightning.data.native import atomic_path

FRAME_MACROS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")


def read_frame(path: str | Path, index: int | None = None) -> NDArray[np.uint8]:
    """Decode one frame as it is meant to be seen: rescaled, windowed, white where the tissue is dense.

    The window is the frame's own, from the functional groups of a multi-frame file, else the file's. A file without
    one is scaled from the range of its ``BitsStored``, never from its own pixels, so that frames stay comparable.

    Args:
        path: a DICOM file of one sample per pixel, of any transfer syntax whose decoder is installed.
        index: number of the frame, the first is 0; None takes the only one.

    Returns:
        Image (H, W).

    Raises:
        InvalidSampleError: naming the file and what is wrong with it.
    """
    pixels, header = _decode(path, index)
    _raise_to_frame(header, index or 0)
    try:
        values = apply_voi_lut(apply_rescale(pixels, header), header)
        low, high = _output_range(header)
    except (ValueError, NotImplementedError, AttributeError, LookupError, TypeError, struct.error) as error:
        raise InvalidSampleError(path, f"{error}", "a window or look-up table as DICOM defines them") from error
    image = ((values.astype(np.float64) - low) / (high - low)).clip(0, 1) * 255
    image = image.round().astype(np.uint8)
    return 255 - image if header.PhotometricInterpretation == "MONOCHROME1" else image


def read_stored(path: str | Path) -> NDArray[Any]:
    """Decode the only frame (H, W) of a file as the integers that it stores, for masks."""
    return _decode(path, None)[0]


def volume_size(path: str | Path) -> tuple[int, int, int]:
    """Number of the frames, and their height and width, pixels; nothing is decoded."""
    header = _read_header(path)
    return _frame_count(header), int(header.Rows), int(header.Columns)


def write_volume(path: Path, frames: NDArray[np.uint16], bits: int, window: tuple[float, float]) -> None:
    """Write a tomosynthesis volume, uncompressed, with its window in the shared functional groups.

    Args:
        path: of the file.
        frames: (N, H, W), values below ``2 ** bits``.
        bits: stored in each pixel.
        window: centre and width.
    """
    volume = Dataset()
    volume.file_meta = FileMetaDataset()
    volume.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    volume.SOPClassUID = volume.file_meta.MediaStorageSOPClassUID = BreastTomosynthesisImageStorage
    uid = generate_uid(entropy_srcs=[path.name, str(path.parent)])
    volume.SOPInstanceUID = volume.file_meta.MediaStorageSOPInstanceUID = uid
    volume.Modality = "MG"
    volume.NumberOfFrames, volume.Rows, volume.Columns = frames.shape
    volume.SamplesPerPixel, volume.PhotometricInterpretation = 1, "MONOCHROME2"
    volume.BitsAllocated, volume.BitsStored, volume.HighBit, volume.PixelRepresentation = 16, bits, bits - 1, 0
    lut, shared = Dataset(), Dataset()
    lut.WindowCenter, lut.WindowWidth = window
    shared.FrameVOILUTSequence = Sequence([lut])
    volume.SharedFunctionalGroupsSequence = Sequence([shared])
    volume.PixelData = frames.astype("<u2").tobytes()
    with atomic_path(path) as temporary:
        volume.save_as(temporary, enforce_file_format=True)


def _read_header(path: str | Path) -> pydicom.FileDataset:
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
    except (OSError, EOFError, InvalidDicomError, ValueError) as error:
        raise InvalidSampleError(path, f"unreadable ({error})", "a DICOM file") from error
    missing = [name for name in ("Rows", "Columns", "BitsStored", "PhotometricInterpretation") if name not in header]
    if missing:
        raise InvalidSampleError(path, f"no pixel data, nor {', '.join(missing)}", "a DICOM image, not a report")
    if header.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise InvalidSampleError(path, f"{header.PhotometricInterpretation} pixels", "grey ones, MONOCHROME1 or 2")
    return header


def _decode(path: str | Path, index: int | None) -> tuple[NDArray[Any], pydicom.FileDataset]:
    header = _read_header(path)
    count = _frame_count(header)
    if index is None and count > 1:
        raise InvalidSampleError(path, f"{count} frames", "one slice; write the slices to files of their own")
    if index is not None and not 0 <= index < count:
        raise InvalidSampleError(path, f"{count} frames, so no slice {index}", f"slices 0 to {count - 1}")
    _check_decoder(path, header)
    try:
        return pixel_array(path, index=index or 0), header
    except AttributeError as error:
        raise InvalidSampleError(path, f"no pixel data ({error})", "a DICOM image with its pixels") from error
    except (ValueError, RuntimeError, OSError, EOFError) as error:
        raise InvalidSampleError(path, f"pixels unreadable ({error})", "a whole file; fetch it again") from error


def _frame_count(header: Dataset) -> int:
    return int(header.get("NumberOfFrames") or 1)


def _check_decoder(path: str | Path, header: pydicom.FileDataset) -> None:
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        raise InvalidSampleError(path, "no TransferSyntaxUID", "a DICOM file that says how its pixels are stored")
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError as error:
        raise InvalidSampleError(path, f"transfer syntax {syntax}", "one that pydicom decodes") from error
    if not available:
        raise InvalidSampleError(
            path,
            f"compressed as '{syntax.name}', for which no decoder is installed",
            "one that is: `pip install pylibjpeg pylibjpeg-libjpeg` adds JPEG lossless and JPEG-LS",
        )


def _raise_to_frame(header: Dataset, index: int) -> None:
    """Lift what the functional groups say of a frame to the top, where pydicom looks; the frame's own comes last."""
    shared = header.get("SharedFunctionalGroupsSequence") or []
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or []
    for group in (*shared[:1], *per_frame[index : index + 1]):
        for macro in FRAME_MACROS:
            for item in (group.get(macro) or [])[:1]:
                header.update(item)


def _output_range(header: Dataset) -> tuple[float, float]:
    """What black and white are after rescaling and windowing by pydicom, which keeps the range of the stored bits."""
    table = header.get("VOILUTSequence") or header.get("ModalityLUTSequence")
    if table:
        return 0, 2 ** table[0].LUTDescriptor[2] - 1
    half = 2 ** (header.BitsStored - 1)
    ends = (-half, half - 1) if header.get("PixelRepresentation") else (0, 2 * half - 1)
    low, high = apply_rescale(np.array(ends), header).tolist()
    return low, high
