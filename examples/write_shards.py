"""Packs RadImageNet and its edges into few files: ``python examples/write_shards.py shards --data.root=RadImageNet``.

Takes the options of ``RadImageNetDataModule``, the edges of HED for example:
``--data.edges=fairdiff_lightning.networks.hed.HED --data.edges.weights=network-bsds500.pth``. A second call goes on
where the first was killed. Training reads the folder with ``--data.shards``. Needs the extra ``shards``.
"""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser

from fairdiff_lightning.data import RadImageNetDataModule


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the shards that the command line asks for."""
    parser = ArgumentParser(description=__doc__, parser_mode="omegaconf")
    parser.add_argument("folder", help="gets the shards")
    parser.add_argument("--samples_per_shard", type=int, default=1000, help="images in a file")
    used_in_training = {"image_size", "batch_size", "num_workers", "shards", "reference_behaviour"}
    parser.add_class_arguments(RadImageNetDataModule, "data", skip=used_in_training)
    given = parser.instantiate_classes(parser.parse_args(arguments))
    given.data.write_shards(given.folder, given.samples_per_shard)


if __name__ == "__main__":
    main()
