import subprocess
import sys

import numpy as np
import pytest
from callback_fakes import H, W, square
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fairdiff_lightning.callbacks import figures

IMAGE = np.random.default_rng(0).random((3, H, W))


def rendered(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)


def near(pixels, colour):
    """Where pixels are close to a hex colour."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.abs(pixels - rgb).max(-1) < 30


def test_overlay_draws_both_contours_where_the_masks_end():
    grey = np.full((1, H, W), 0.5)
    pixels = rendered(figures.overlay(grey, square(1, 0, 2), square(1, 4, 2)))
    middle = pixels.shape[1] // 2
    truth, prediction = near(pixels, figures.TRUTH), near(pixels, figures.PREDICTION)
    assert truth.any()
    assert prediction.any()
    assert not truth[:, middle:].any()
    assert not prediction[:, :middle].any()


def test_overlay_of_empty_and_full_masks_shows_the_image_only():
    pixels = rendered(figures.overlay(np.zeros((1, H, W)), np.zeros((1, H, W)), np.ones((1, H, W))))
    assert pixels.max() == 0
    assert pixels.shape[1] / pixels.shape[0] == pytest.approx(W / H, abs=0.01)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_pixels_of_any_range_and_channels_are_shown(channels):
    pixels = figures.to_pixels(np.linspace(-3, 9, channels * 20).reshape(channels, 4, 5))
    assert pixels.shape == ((4, 5, 3) if channels == 3 else (4, 5))
    assert pixels.min() == 0
    assert pixels.max() == 1


def test_group_bars_leave_out_what_is_not_known():
    value = np.array([[0.5, 0.25], [np.nan, np.nan]])
    figure = figures.group_bars(["A", "B"], [3, 0], value, value - 0.1, value + 0.1, [0.5, np.nan], ["rim", "cup"])
    rim, cup = figure.axes
    assert [bar.get_width() for bar in rim.patches] == [0.5, 0.0]
    assert [bar.get_width() for bar in cup.patches] == [0.25, 0.0]
    assert [label.get_text() for label in rim.get_yticklabels()] == ["A  (n=3)", "B  (n=0)"]
    assert len(rim.containers[1].lines[2][0].get_segments()) == 1
    rendered(figure)


def test_heat_map_writes_the_numbers_that_exist():
    figure = figures.heat_map([[0.25, 0.75], [np.nan, np.nan]], ["A", "unknown"], ["e0", "e1"], "Usage")
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.25", "0.75"]
    rendered(figure)


def test_sample_grid_has_three_pictures_for_each_sample():
    figure = figures.sample_grid([IMAGE] * 2, [square(0, 0, 3)] * 2, [square(1, 1, 3)] * 2)
    assert len(figure.axes) == 6
    rendered(figure)


def test_tensorboard_stores_the_figure(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    figures.log_figure([logger], "val/samples", figures.overlay(IMAGE, square(0, 0, 3), square(1, 1, 3)), 7)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    assert [event.step for event in events.Images("val/samples")] == [7]


def test_loggers_with_other_ways_are_served_and_those_without_left_alone(tmp_path):
    calls = []

    class Recorder:
        def __init__(self, **methods):
            self.__dict__.update(methods)

    def record(name):
        return lambda *args, **kwargs: calls.append((name, args, kwargs))

    wandb = Recorder(experiment=object(), log_image=record("wandb"))
    mlflow = Recorder(experiment=Recorder(log_figure=record("mlflow")), run_id="r1")
    comet = Recorder(experiment=Recorder(log_figure=record("comet")))
    loggers = [wandb, mlflow, comet, CSVLogger(tmp_path)]
    figures.log_figure(Recorder(loggers=loggers), "val/samples", "figure", 3)
    assert calls == [
        ("wandb", (), {"key": "val/samples", "images": ["figure"], "step": 3}),
        ("mlflow", ("r1", "figure", "val/samples/00000003.png"), {}),
        ("comet", (), {"figure_name": "val/samples", "figure": "figure", "step": 3}),
    ]


def test_importing_the_figures_loads_neither_matplotlib_nor_lightning():
    loaded = "print({'matplotlib', 'lightning', 'torch'} & set(sys.modules))"
    code = f"import sys, fairdiff_lightning.callbacks.figures; {loaded}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
