"""LeFusion's options through the command line: separate networks, cross-attention, guidance, and a lesion's context."""

import sys
from pathlib import Path

import numpy as np
import torch
from test_cli import CONFIGS
from test_lefusion import QUIET, SHORT, TINY, size

from fairdiff_lightning.cli import main, newest_checkpoint
from fairdiff_lightning.data import Emidec, EmidecDataModule

CONFIG = str(CONFIGS / "emidec" / "lefusion.yaml")
OPTIONS = [
    "--model.decomposition=separate",
    "--model.conditioning=cross_attention",
    "--model.guidance_scale=2",
    "--model.roi=lesion",
    "--model.context=[4,4,2]",
]


def test_hearts_are_painted_by_a_network_for_each_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fairdiff"])
    for name in ("EMIDEC_ROOT", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)
    small = ["--model.network_args={heads: 2, head_dim: 8}", "--model.num_validation_samples=0"]
    arguments = ["--config", CONFIG, *size(CONFIG), *TINY["lefusion"], *small, *OPTIONS, *QUIET]
    main(["fit", *arguments, *SHORT, "--trainer.limit_train_batches=1"])
    saved = torch.load(newest_checkpoint(Path(), "last"), weights_only=True)
    chosen = saved["hyper_parameters"]
    assert (chosen["decomposition"], tuple(chosen["context"])) == ("separate", (4, 4, 2))
    assert {key.split(".")[2] for key in saved["state_dict"] if key.startswith("network.")} == {"0", "1"}

    plan = ["--data.generate.total=2", "--data.generate.masks=own", "--data.generate.backgrounds=train"]
    main(["predict", *arguments, *plan, "--ckpt_path=last"])
    (manifest,) = Path().rglob("synthetic/manifest.csv")
    data = EmidecDataModule()
    scans = {record.id: record for record in data.dataset.index(data.folder).records}
    made = Emidec().index(manifest.parent).records
    assert len(made) == 2
    for record in made:
        image, mask = Emidec().read_volumes(record)
        scan, _ = Emidec().read_volumes(scans[record.source])
        start = np.round(np.linalg.solve(scan.affine, image.affine)[:3, 3]).astype(int)
        before = scan.array[tuple(slice(s, s + n) for s, n in zip(start, image.shape, strict=True))]
        lesion = np.isin(mask.array, (3, 4))
        np.testing.assert_allclose(image.array[~lesion], before[~lesion], atol=1e-6)
        for lesion_class in (3, 4):
            inside = mask.array == lesion_class
            assert not inside.any() or np.mean(image.array[inside] != before[inside]) > 0.9
