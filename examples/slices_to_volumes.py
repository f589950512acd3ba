"""Writes slices that a generator made as NIfTI volumes: ``python examples/slices_to_volumes.py root slices output``.

``root`` is the folder of the Decathlon task, ``slices`` what `fairdiff predict` of a generator wrote. A volume has the
geometry and intensities of the scan that its slices were made from, which shows where no slice was made.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fairdiff_lightning.data import DecathlonSliceDataModule
from fairdiff_lightning.data.decathlon_slices import SliceProtocol


def main(
    root: str, slices: str, output: str, channel: int | None = None, protocol: SliceProtocol = "strict"
) -> list[Path]:
    """Write a volume for each scan and each of the samples of its slices."""
    data = DecathlonSliceDataModule(root, fold=None, channel=channel, protocol=protocol)
    data.prepare_data()
    data.setup()
    written = data.write_generated(Path(slices), Path(output))
    print(f"{len(written)} volumes: {Path(output).resolve()}")
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root")
    parser.add_argument("slices")
    parser.add_argument("output")
    parser.add_argument("--channel", type=int, help="of several modalities, as the generator's data had it")
    parser.add_argument(
        "--protocol", choices=["strict", "legacy"], default="strict", help="as the generator's data had it"
    )
    main(**vars(parser.parse_args()))
