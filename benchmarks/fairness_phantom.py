"""How fair are plain training, oversampling, Equal Scale, FEBS, MoE and dMoE on the phantom? A table, as it comes out.

``python benchmarks/fairness_phantom.py``: every method gets the same network, optimizer and number of steps; FEBS, as
in its paper, spends the last quarter of them fine-tuning. Equal Scale (FairSeg only) fills the small groups up to the
largest with synthetic samples of one PointDiffusion and one ControlNetSynth trained here; "real masks" leaves out the
first, "fresh phantoms" both: samples as a generator without faults would make them, the most that Equal Scale can give.
Scores are averaged over the seeds for each test image, and the intervals (95 %) resample the test images within their
groups.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from timing import machine

from fairdiff_lightning.callbacks.comparison import compare_runs
from fairdiff_lightning.cli import main, newest_checkpoint
from fairdiff_lightning.data import HAM10000, FairSeg
from fairdiff_lightning.data.fairseg import PHANTOM_LOOKS, PHANTOM_SIZE
from fairdiff_lightning.data.native import to_image_tensor
from fairdiff_lightning.data.phantoms import slo_fundus
from fairdiff_lightning.data.sample import Sample

CONFIGS = Path(__file__).parents[1] / "configs" / "demo"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
TOTAL = 477  # thrice the largest group's training samples: nothing real is left out
EQUAL_SCALE = ["plain", "--data.init_args.balance=equal_scale", f"--data.init_args.total={TOTAL}"]
ARGUMENTS = {
    "plain": ["plain"],
    "oversampled": ["plain", "--data.init_args.balance=oversample"],
    "FEBS": ["plain", "--model.init_args.loss=febs"],
    "MoE": ["dmoe", "--model.init_args.routing=shared"],
    "dMoE": ["dmoe"],
    "Equal Scale": EQUAL_SCALE,
    "Equal Scale, real masks": EQUAL_SCALE,
    "Equal Scale, fresh phantoms": EQUAL_SCALE,
    "Equal Scale, dMoE": ["dmoe", *EQUAL_SCALE[1:]],
}
ATTRIBUTES = {"fairseg": "race", "ham10000": "age"}
DATASETS = {"fairseg": FairSeg, "ham10000": HAM10000}


def generate(folder: Path) -> dict[str, Path]:
    """Train both generators and make what the groups lack; method -> folder of its synthetic samples."""
    points, controlnet = (
        ["--config", str(CONFIGS / f"fairseg_{name}.yaml"), *QUIET] for name in ("points", "controlnet")
    )
    plan = ["--data.generate.equal_scale=true", f"--data.generate.total={TOTAL}", "--ckpt_path=last"]
    at = {name: f"--trainer.default_root_dir={folder / name}" for name in ("points", "controlnet", "real_masks")}
    masks = folder / "points" / "synthetic"
    main(["fit", *points, at["points"]])
    main(["predict", *points, at["points"], *plan])
    main(["fit", *controlnet, at["controlnet"]])
    main(["predict", *controlnet, at["controlnet"], *plan, f"--data.generate.masks={masks}"])
    plan[-1] = f"--ckpt_path={newest_checkpoint(folder / 'controlnet', 'last')}"
    main(["predict", *controlnet, at["real_masks"], *plan, "--data.generate.masks=train"])
    made = folder / "controlnet" / "synthetic"
    draw_fresh_phantoms(folder / "fresh_phantoms")
    return {
        "Equal Scale": made,
        "Equal Scale, dMoE": made,
        "Equal Scale, real masks": folder / "real_masks" / "synthetic",
        "Equal Scale, fresh phantoms": folder / "fresh_phantoms",
    }


def draw_fresh_phantoms(folder: Path) -> None:
    """Enough phantoms that are in no split, of each group but the largest."""
    for group, look in enumerate(PHANTOM_LOOKS[:-1]):
        for k in range(TOTAL // len(PHANTOM_LOOKS)):
            image, mask = slo_fundus(np.random.default_rng([1, group, k]), PHANTOM_SIZE, look)
            sample: Sample = {
                "id": f"fresh_{group}_{k:05d}",
                "image": to_image_tensor(image),
                "mask": torch.from_numpy(mask.astype(np.int64))[None],
                "attributes": {"race": torch.tensor(group)},
                "synthetic": torch.tensor(True),
            }
            FairSeg().write(folder, sample)


def train_and_test(
    dataset: str, method: str, seed: int, steps: int, folder: Path, synthetic: Path | None = None
) -> Path:
    """The table with the scores of every test image."""
    kind, *extra = ARGUMENTS[method]
    extra += [f"--data.init_args.synthetic=[{synthetic}]"] if synthetic else []
    common = ["--config", str(CONFIGS / f"{dataset}_{kind}.yaml"), f"--seed_everything={seed}", *QUIET]
    common += [f"--data.init_args.seed={seed}", f"--trainer.default_root_dir={folder}"]
    length = [f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1"]
    if method == "FEBS":
        first = folder / "before"
        before = [*common, f"--trainer.default_root_dir={first}"]
        main(["fit", *before, f"--trainer.max_steps={steps - steps // 4}", "--trainer.max_epochs=-1"])
        length = [f"--trainer.max_steps={steps // 4}", "--trainer.max_epochs=-1"]
        extra += [f"--model.init_args.init_from={newest_checkpoint(first, 'last')}"]
        extra += ["--model.init_args.optimizer.lr=0.0005"]
    main(["fit", *common, *extra, *length])
    main(["test", *common, *extra, "--ckpt_path", str(newest_checkpoint(folder, "last")), "--verbose=false"])
    return max(folder.rglob("cases.csv"), key=lambda path: path.stat().st_mtime)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", choices=sorted(ATTRIBUTES), default="fairseg")
    parser.add_argument("--methods", nargs="+", choices=list(ARGUMENTS), default=list(ARGUMENTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--folder", type=Path, default=Path("runs") / "fairness_phantom", help="a new one below it")
    args = parser.parse_args()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    attribute = ATTRIBUTES[args.dataset]
    names = DATASETS[args.dataset]().attributes[attribute].groups
    start, folder = time.time(), args.folder / f"{args.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    needs_synthetic = [m for m in args.methods if m.startswith("Equal Scale") and args.dataset == "fairseg"]
    synthetic = generate(folder / "generators") if needs_synthetic else {}
    methods = [m for m in args.methods if m in synthetic or not m.startswith("Equal Scale")]
    cases: dict[str, list[Path]] = {}
    for method in methods:
        cases[method] = [
            train_and_test(args.dataset, method, seed, args.steps, folder / method / str(seed), synthetic.get(method))
            for seed in range(args.seeds)
        ]
        print(compare_runs(cases, attribute, names).markdown().splitlines()[-1], flush=True)
    setting = f"{args.dataset} phantom, {args.seeds} seeds, {args.steps} steps each"
    print(f"\n{machine()}; {setting}, {time.time() - start:.0f} s\n")
    print(compare_runs(cases, attribute, names).markdown())
