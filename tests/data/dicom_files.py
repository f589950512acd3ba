"""DICOM files as scanners and archives make them, written with pydicom alone."""

import io

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

FORMATS = {JPEG2000Lossless: "JPEG2000", JPEGBaseline8Bit: "JPEG"}


def encode(frame, syntax):
    """One compressed frame; pillow writes whole 8 or 16 bits, as the volumes of BCS-DBT store their 10 bits."""
    stream = io.BytesIO()
    options = {"irreversible": False} if syntax == JPEG2000Lossless else {"quality": 100}
    Image.fromarray(frame).save(stream, format=FORMATS[syntax], **options)
    return stream.getvalue()


def window_item(center, width, **more):
    lut = Dataset()
    lut.WindowCenter, lut.WindowWidth = center, width
    for name, value in more.items():
        setattr(lut, name, value)
    group = Dataset()
    group.FrameVOILUTSequence = Sequence([lut])
    return group


def write_dicom(path, frames, bits=10, syntax=pydicom.uid.ExplicitVRLittleEndian, encoded=None, **tags):
    """Write frames (N, H, W); ``encoded`` gives the compressed ones as bytes, ``tags`` replace or (None) remove."""
    volume = Dataset()
    volume.file_meta = FileMetaDataset()
    volume.file_meta.TransferSyntaxUID = syntax
    volume.SOPClassUID = pydicom.uid.BreastTomosynthesisImageStorage
    volume.SOPInstanceUID = "1.2.3"
    allocated = frames.dtype.itemsize * 8
    volume.NumberOfFrames, volume.Rows, volume.Columns = frames.shape
    volume.SamplesPerPixel, volume.PhotometricInterpretation = 1, "MONOCHROME2"
    volume.BitsAllocated, volume.BitsStored, volume.HighBit = allocated, bits, bits - 1
    volume.PixelRepresentation = int(np.issubdtype(frames.dtype, np.signedinteger))
    if encoded or syntax in FORMATS:
        volume.PixelData = encapsulate(encoded or [encode(frame, syntax) for frame in frames])
        volume["PixelData"].VR = "OB"
    else:
        volume.PixelData = frames.tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(volume, name)
        else:
            setattr(volume, name, value)
    if syntax == RLELossless:
        volume.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        volume.compress(RLELossless, generate_instance_uid=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    volume.save_as(path, enforce_file_format=True)
    return path
