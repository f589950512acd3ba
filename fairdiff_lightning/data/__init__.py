"""Data sets in their owners' layouts, the sample contract, and the data modules that feed any LightningModule."""

from fairdiff_lightning.data.augmentation import RandomRotateFlip
from fairdiff_lightning.data.bcs_dbt import BCSDBT, BCSDBTDataModule
from fairdiff_lightning.data.dataset import SegmentationDataset
from fairdiff_lightning.data.dbt import DBT, DBTDataModule
from fairdiff_lightning.data.emidec import Emidec
from fairdiff_lightning.data.errors import DatasetNotFoundError, InvalidSampleError
from fairdiff_lightning.data.fairseg import FairSeg, FairSegDataModule
from fairdiff_lightning.data.ham10000 import HAM10000, HAM10000DataModule
from fairdiff_lightning.data.lidc import LIDC
from fairdiff_lightning.data.mixing import equal_scale
from fairdiff_lightning.data.native import NativeDataset, Record
from fairdiff_lightning.data.requests import GenerationPlan, Request
from fairdiff_lightning.data.rois import ROI, candidate_places, extract_rois, lung_mask, paste_roi
from fairdiff_lightning.data.sample import AttributeSpec, Sample, SampleError, collate, validate
from fairdiff_lightning.data.samplers import GroupBalancedSampler
from fairdiff_lightning.data.segmentation import SegmentationDataModule
from fairdiff_lightning.data.splits import split_units
from fairdiff_lightning.data.volume_dataset import VolumeDataset
from fairdiff_lightning.data.volumes import Volume, Window, crop_or_pad, read_volume, write_volume

__all__ = [
    "BCSDBT",
    "DBT",
    "HAM10000",
    "LIDC",
    "ROI",
    "AttributeSpec",
    "BCSDBTDataModule",
    "DBTDataModule",
    "DatasetNotFoundError",
    "Emidec",
    "FairSeg",
    "FairSegDataModule",
    "GenerationPlan",
    "GroupBalancedSampler",
    "HAM10000DataModule",
    "InvalidSampleError",
    "NativeDataset",
    "RandomRotateFlip",
    "Record",
    "Request",
    "Sample",
    "SampleError",
    "SegmentationDataModule",
    "SegmentationDataset",
    "Volume",
    "VolumeDataset",
    "Window",
    "candidate_places",
    "collate",
    "crop_or_pad",
    "equal_scale",
    "extract_rois",
    "lung_mask",
    "paste_roi",
    "read_volume",
    "split_units",
    "validate",
    "write_volume",
]
