"""Data sets in their owners' layouts, the sample contract, and the data modules that feed any LightningModule."""

from fairdiff_lightning.data.augmentation import RandomMirror, RandomRotateFlip
from fairdiff_lightning.data.bcs_dbt import BCSDBT, BCSDBTDataModule
from fairdiff_lightning.data.busi import BUSI, BUSIDataModule
from fairdiff_lightning.data.classical_augmentation import ClassicalAugmentation
from fairdiff_lightning.data.dataset import SegmentationDataset
from fairdiff_lightning.data.dbt import DBT, DBTDataModule
from fairdiff_lightning.data.decathlon import Decathlon, DecathlonDataModule
from fairdiff_lightning.data.decathlon_slice_module import DecathlonSliceDataModule
from fairdiff_lightning.data.decathlon_slices import DecathlonSlices
from fairdiff_lightning.data.dicom_seg import read_segmentation, write_segmentation
from fairdiff_lightning.data.edge_augmentation import RandomZoomRotate
from fairdiff_lightning.data.edges import CannyEdges, EdgeCache, EdgeReader, ScharrEdges, edges_of, label_contour
from fairdiff_lightning.data.emidec import Emidec, EmidecDataModule
from fairdiff_lightning.data.errors import DatasetNotFoundError, InvalidSampleError
from fairdiff_lightning.data.fairseg import FairSeg, FairSegDataModule
from fairdiff_lightning.data.folds import case_folds, cross_fold_summary, fold_records
from fairdiff_lightning.data.frames import PictureFrame, VolumeFrame
from fairdiff_lightning.data.ham10000 import HAM10000, HAM10000DataModule
from fairdiff_lightning.data.image_index import ImageIndex
from fairdiff_lightning.data.lidc import LIDC, LIDCDataModule
from fairdiff_lightning.data.mixing import equal_scale
from fairdiff_lightning.data.native import NativeDataset, Record
from fairdiff_lightning.data.native_module import NativeDataModule
from fairdiff_lightning.data.patch_merge import PartnerIndex, PatchMerge, joint_minmax, merge_partners
from fairdiff_lightning.data.prostate import Prostate, ProstateDataModule
from fairdiff_lightning.data.radimagenet import RadImageNet, RadImageNetDataModule
from fairdiff_lightning.data.requests import GenerationPlan, Request
from fairdiff_lightning.data.resumable_sampler import ResumableLoader, ResumableSampler
from fairdiff_lightning.data.rois import ROI, candidate_places, extract_rois, lung_mask, paste_roi
from fairdiff_lightning.data.rtstruct import read_structures, structure_names, write_structures
from fairdiff_lightning.data.sample import AttributeSpec, Sample, SampleError, collate, validate
from fairdiff_lightning.data.samplers import GroupBalancedSampler
from fairdiff_lightning.data.segmentation import SegmentationDataModule
from fairdiff_lightning.data.slice_stack import read_predictions, stack_slices, volume_scores
from fairdiff_lightning.data.splits import split_units
from fairdiff_lightning.data.volume_dataset import VolumeDataset
from fairdiff_lightning.data.volume_module import VolumeDataModule
from fairdiff_lightning.data.volumes import Volume, Window, crop_or_pad, read_volume, write_volume

__all__ = [
    "BCSDBT",
    "BUSI",
    "DBT",
    "HAM10000",
    "LIDC",
    "ROI",
    "AttributeSpec",
    "BCSDBTDataModule",
    "BUSIDataModule",
    "CannyEdges",
    "ClassicalAugmentation",
    "DBTDataModule",
    "DatasetNotFoundError",
    "Decathlon",
    "DecathlonDataModule",
    "DecathlonSliceDataModule",
    "DecathlonSlices",
    "EdgeCache",
    "EdgeReader",
    "Emidec",
    "EmidecDataModule",
    "FairSeg",
    "FairSegDataModule",
    "GenerationPlan",
    "GroupBalancedSampler",
    "HAM10000DataModule",
    "ImageIndex",
    "InvalidSampleError",
    "LIDCDataModule",
    "NativeDataModule",
    "NativeDataset",
    "PartnerIndex",
    "PatchMerge",
    "PictureFrame",
    "Prostate",
    "ProstateDataModule",
    "RadImageNet",
    "RadImageNetDataModule",
    "RandomMirror",
    "RandomRotateFlip",
    "RandomZoomRotate",
    "Record",
    "Request",
    "ResumableLoader",
    "ResumableSampler",
    "Sample",
    "SampleError",
    "ScharrEdges",
    "SegmentationDataModule",
    "SegmentationDataset",
    "Volume",
    "VolumeDataModule",
    "VolumeDataset",
    "VolumeFrame",
    "Window",
    "candidate_places",
    "case_folds",
    "collate",
    "crop_or_pad",
    "cross_fold_summary",
    "edges_of",
    "equal_scale",
    "extract_rois",
    "fold_records",
    "joint_minmax",
    "label_contour",
    "lung_mask",
    "merge_partners",
    "paste_roi",
    "read_predictions",
    "read_segmentation",
    "read_structures",
    "read_volume",
    "split_units",
    "stack_slices",
    "structure_names",
    "validate",
    "volume_scores",
    "write_segmentation",
    "write_structures",
    "write_volume",
]
