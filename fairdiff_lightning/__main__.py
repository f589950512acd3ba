"""``python -m fairdiff_lightning`` is ``fairdiff``."""

from fairdiff_lightning.cli import main

if __name__ == "__main__":
    main()
