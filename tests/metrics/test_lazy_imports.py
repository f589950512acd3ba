import subprocess
import sys

import pytest

import fairdiff_lightning
from fairdiff_lightning import callbacks, losses, metrics, networks

LIGHT = """
import sys
from fairdiff_lightning.losses import FEBSLoss, load_balance_loss
from fairdiff_lightning.metrics import bootstrap_interval, dice_score, equity_scaled
assert not {"monai", "torchmetrics", "lightning"} & set(sys.modules), "tensor functions must load torch only"
"""


def test_tensor_functions_import_torch_only():
    subprocess.run([sys.executable, "-c", LIGHT], check=True)


@pytest.mark.parametrize("package", [fairdiff_lightning, callbacks, losses, metrics, networks])
def test_every_exported_name_exists_and_loads_lazily(package):
    names = set(package.__all__) - {"__version__"}
    assert {getattr(package, name).__name__ for name in names} == names == set(package.__dir__())
    with pytest.raises(AttributeError, match="DiceLos"):
        package.DiceLos  # noqa: B018
