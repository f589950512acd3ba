"""The main job end to end on the embedded phantom: train a fair segmenter, test it, save the fairness report."""

from pathlib import Path

from fairdiff_lightning.cli import main

CONFIG = str(Path(__file__).parents[1] / "configs" / "demo" / "fairseg_dmoe.yaml")

if __name__ == "__main__":
    main(["fit", "--config", CONFIG])
    main(["test", "--config", CONFIG, "--ckpt_path", "best", "--verbose=false", "--trainer.enable_progress_bar=false"])
