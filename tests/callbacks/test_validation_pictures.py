import warnings

import pytest
import torch
from callback_fakes import Data, Foreign, sample, trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchmetrics import Metric

from fairdiff_lightning.callbacks import ExpertUsageHeatMap, SampleGrid
from fairdiff_lightning.callbacks.expert_usage import PATIENCE, unused_experts

SAMPLES = [sample(f"s{i}", i % 2, (0.5, 0.5)) for i in range(5)]


class Shares(Metric):
    """Gives the table that it was last shown; NaN before."""

    def __init__(self):
        super().__init__()
        self.add_state("table", torch.full((4, 4), float("nan")), dist_reduce_fx=None)

    def update(self, table):
        self.table = table

    def compute(self):
        return self.table


class Mixture(Foreign):
    """Fills the metric in validation and resets it in its own hook."""

    attribute = "race"

    def __init__(self, table):
        super().__init__()
        self.expert_usage, self.table = Shares(), table

    def validation_step(self, batch, batch_idx):
        self.expert_usage.update(self.table)
        return super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        self.expert_usage.reset()


def fit(folder, module, *callbacks, epochs=1, **arguments):
    logger = TensorBoardLogger(folder)
    fitter = trainer(folder, *callbacks, logger=logger, max_epochs=epochs, **arguments)
    fitter.fit(module, Data(SAMPLES, batch_size=3))
    return EventAccumulator(logger.log_dir).Reload()


def steps(events, tag):
    return [event.step for event in events.Images(tag)] if tag in events.Tags()["images"] else []


@pytest.fixture
def drawn(monkeypatch):
    """What the callbacks ask to draw."""
    calls = []
    for module, name in (("sample_grid", "sample_grid"), ("expert_usage", "heat_map")):
        path = f"fairdiff_lightning.callbacks.{module}"
        monkeypatch.setattr(f"{path}.{name}", lambda *args: calls.append(args))
        monkeypatch.setattr(f"{path}.log_figure", lambda *args: None)
    return calls


def test_sample_grid_is_logged_in_the_epochs_asked_for(tmp_path):
    events = fit(tmp_path, Foreign(), SampleGrid(num_samples=2, every_n_epochs=2), epochs=3)
    assert steps(events, "val/samples") == [2, 6]  # two steps an epoch; none in the sanity check


def test_sample_grid_shows_the_first_batch(tmp_path, drawn):
    fit(tmp_path, Foreign(), SampleGrid(num_samples=8))
    ((images, truths, predictions),) = drawn
    assert len(images) == len(truths) == len(predictions) == 3
    for index, image in enumerate(images):
        torch.testing.assert_close(torch.from_numpy(image), SAMPLES[index]["image"])
        assert (torch.from_numpy(predictions[index]) == SAMPLES[index]["prediction"]).all()


def test_sample_grid_names_the_module_that_returns_no_prediction(tmp_path):
    class Silent(Foreign):
        def validation_step(self, batch, batch_idx):
            return None

    with pytest.raises(ValueError, match=r"SampleGrid: Silent\.validation_step gave NoneType\. Missing: 'prediction'"):
        fit(tmp_path, Silent(), SampleGrid(), num_sanity_val_steps=0)


def test_heat_map_sees_the_metric_before_the_module_resets_it(tmp_path, drawn):
    table = torch.full((4, 4), 0.25)
    fit(tmp_path, Mixture(table), ExpertUsageHeatMap(), epochs=2)
    assert len(drawn) == 2
    for shares, rows, columns, _ in drawn:
        assert (shares == table).all()
        assert rows == ["Asian", "Black", "White", "unknown"]
        assert len(columns) == 4


def test_heat_map_is_logged_as_a_picture(tmp_path):
    events = fit(tmp_path, Mixture(torch.full((4, 4), 0.25)), ExpertUsageHeatMap())
    assert steps(events, "val/expert_usage") == [2]


def test_module_without_experts_or_with_unused_metric_is_left_alone(tmp_path, drawn):
    fit(tmp_path, Foreign(), ExpertUsageHeatMap())
    fit(tmp_path, Mixture(torch.full((4, 4), float("nan"))), ExpertUsageHeatMap())
    assert not drawn


def test_collapse_is_warned_of_once(tmp_path, drawn):
    collapsed = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, Mixture(collapsed), ExpertUsageHeatMap(), epochs=PATIENCE - 1)
        assert not [w for w in caught if "collapsed" in str(w.message)], "routers need some epochs to spread out"
        fit(tmp_path, Mixture(collapsed), ExpertUsageHeatMap(), epochs=PATIENCE + 2)
    messages = [str(w.message) for w in caught if "collapsed" in str(w.message)]
    assert len(messages) == 1
    assert "Experts [2, 3] of 4" in messages[0]


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([[0.98, 0.02], [0.5, 0.5], [0.5, 0.5]], []),  # one group uses expert 1
        ([[0.98, 0.02], [0.96, 0.04], [0.5, 0.5]], [1]),  # below 1 / 20 everywhere; the unknown group does not count
        ([[0.98, 0.02], [float("nan")] * 2, [0.5, 0.5]], [1]),  # a group without images says nothing
        ([[0.94, 0.06], [0.0, 0.0], [0.5, 0.5]], []),
        ([[float("nan")] * 2, [float("nan")] * 2, [1.0, 0.0]], []),
    ],
)
def test_unused_experts_are_those_that_every_known_group_avoids(shares, expected):
    assert unused_experts(torch.tensor(shares)) == expected
