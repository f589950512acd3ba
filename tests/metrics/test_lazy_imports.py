import subprocess
import sys

import pytest

from fairdiff_lightning import losses, metrics

LIGHT = """
import sys
from fairdiff_lightning.losses import FEBSLoss, load_balance_loss
from fairdiff_lightning.metrics import bootstrap_interval, dice_score, equity_scaled
assert not {"monai", "torchmetrics", "lightning"} & set(sys.modules), "tensor functions must load torch only"
"""


def test_tensor_functions_import_torch_only():
    subprocess.run([sys.executable, "-c", LIGHT], check=True)


@pytest.mark.parametrize("package", [losses, metrics])
def test_every_exported_name_exists(package):
    assert {getattr(package, name).__name__ for name in package.__all__} == set(package.__all__)
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="has no attribute 'DiceLos'"):
        package.DiceLos  # noqa: B018
