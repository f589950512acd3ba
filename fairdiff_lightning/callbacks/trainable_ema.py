"""A moving average of the trainable parameters alone, for modules that are mostly frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

RAW = "current_model_state"
"""Where a checkpoint holds the weights that were being trained; Lightning's own averaging has them there too."""
EMA = "trainable_ema"
"""Where a checkpoint holds how often the average was updated."""


class TrainableEMA(Callback):
    """Keeps an exponential moving average of the parameters that require a gradient, and evaluates with it.

    Frozen parameters are neither copied nor averaged, nor are buffers. What requires a gradient is looked up when fit
    starts. The average stands in the module while it validates, tests or predicts, and leaves it afterwards, also after
    an error; training goes on from the raw weights, and those are in the module when fit has ended.

    A checkpoint's ``state_dict`` holds the averaged weights, so that testing, predicting and ``load_from_checkpoint``
    use them without this callback; the raw ones lie under ``current_model_state`` (trainable only). Fit resumed with
    the callback goes on from these, to the weights of an unbroken run; :func:`warn_about_lost_ema` tells who resumes
    without it. A module that leaves its frozen weights out of ``state_dict`` in ``on_save_checkpoint`` is called after
    this callback, and finds the averages in it. After testing with another checkpoint, the average starts anew.

    Lightning saves ``save_weights_only`` checkpoints without asking callbacks: they hold the raw weights (it warns).

    Args:
        decay: of the average, at each update.
        warmup: let the decay rise to that, 1 - (1 + n)^(-2/3) after n updates; otherwise constant. In both cases the
            first update copies the weights.
        update_every_n_steps: optimizer steps between updates.

    Raises:
        ValueError: an argument is out of range, the strategy shards parameters, nothing is trainable, or a resumed
            checkpoint holds other trainable parameters.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True, update_every_n_steps: int = 1) -> None:
        if not 0 <= decay < 1 or update_every_n_steps < 1:
            raise ValueError(
                f"decay is {decay} and update_every_n_steps {update_every_n_steps}, expected a decay in [0, 1) and at "
                "least one step."
            )
        self.decay, self.warmup, self.update_every_n_steps = decay, warmup, update_every_n_steps
        self._ema: EMAModel | None = None
        self._parameters: list[nn.Parameter] = []
        self._names: dict[str, int] = {}
        self._resumed: tuple[dict[str, Tensor], int] | None = None
        self._updated_at = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would save or train other weights than it seems."""
        if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
            raise ValueError(
                f"TrainableEMA: {type(trainer.strategy).__name__} shards the parameters, and the average needs them "
                "whole. Train with ddp, or leave the callback out."
            )
        if stage == "fit" and any(
            getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks
        ):
            rank_zero_warn(
                "TrainableEMA: a ModelCheckpoint has save_weights_only=True. Lightning asks no callback for these "
                "checkpoints, so they hold the raw weights, not the averaged ones."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the average at the weights, or where the resumed checkpoint left it."""
        parameters = [p for p in pl_module.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(f"TrainableEMA: no parameter of {type(pl_module).__name__} requires a gradient.")
        if self._ema is None or [*map(id, parameters)] != [*map(id, self._parameters)]:
            self._parameters, self._names = parameters, _trainable(pl_module)
            self._ema = self._new_average()
        if self._resumed is not None:
            averaged, self._ema.optimization_step = self._resumed
            for name, index in self._names.items():
                self._ema.shadow_params[index].copy_(averaged[name])
            self._resumed = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count steps from where training starts."""
        self._updated_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after an optimizer step; with accumulated gradients not every batch has one."""
        step = trainer.global_step
        if step != self._updated_at and step % self.update_every_n_steps == 0:
            assert self._ema is not None
            self._ema.step(self._parameters)
            self._updated_at = step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in."""
        self._swap_in()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the raw weights back."""
        self._restore()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the raw weights back."""
        self._restore()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as the module's weights, and the raw ones beside them."""
        if self._ema is None:
            return
        raw = self._stored() or [parameter.detach() for parameter in self._parameters]
        averaged = {name: self._ema.shadow_params[index] for name, index in self._names.items()}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **averaged}
        checkpoint[RAW] = {name: raw[index] for name, index in self._names.items()}
        checkpoint[EMA] = {"updates": self._ema.optimization_step}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resume from the raw weights; whatever else loads a checkpoint evaluates the weights that it holds."""
        self._ema = None
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if EMA not in checkpoint:
            rank_zero_warn(
                "TrainableEMA: the checkpoint holds no average of it; one starts at the checkpoint's weights."
            )
            return
        raw, trainable = checkpoint[RAW], _trainable(pl_module)
        if raw.keys() != trainable.keys():
            raise ValueError(
                "TrainableEMA: the checkpoint was trained with other trainable parameters. Only in the checkpoint: "
                f"{sorted(raw.keys() - trainable.keys())}; only in the module: {sorted(trainable.keys() - raw.keys())}."
                " Freeze what was frozen then."
            )
        parameters = dict(pl_module.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, value in raw.items():
                parameters[name].copy_(value)
        averaged = {name: checkpoint["state_dict"][name].clone() for name in raw}
        self._resumed = averaged, checkpoint[EMA]["updates"]

    def _new_average(self) -> EMAModel:
        from diffusers.training_utils import EMAModel

        floor = 0.0 if self.warmup else self.decay
        ema = EMAModel(self._parameters, self.decay, floor, use_ema_warmup=self.warmup, foreach=True)
        # Half precision has no room for steps of 1 - decay.
        half = (torch.bfloat16, torch.float16)
        ema.shadow_params = [shadow.float() if shadow.dtype in half else shadow for shadow in ema.shadow_params]
        return ema

    def _swap_in(self) -> None:
        if self._ema is not None:
            self._ema.store(self._parameters)
            self._ema.copy_to(self._parameters)

    def _restore(self) -> None:
        if self._ema is not None and self._stored() is not None:
            self._ema.restore(self._parameters)

    def _stored(self) -> list[Tensor] | None:
        """The raw weights, while the average stands in the module."""
        return self._ema.temp_stored_params if self._ema is not None else None


def warn_about_lost_ema(checkpoint: dict[str, Any], trainer: Trainer | None) -> None:
    """Warn when fit resumes from a checkpoint of averaged weights without the callback that knows the raw ones.

    Lightning would load the averaged weights and train on from them. For ``LightningModule.on_load_checkpoint``.

    Args:
        checkpoint: that is being loaded.
        trainer: that loads it, None without one.
    """
    if RAW not in checkpoint or trainer is None or trainer.state.fn != TrainerFn.FITTING:
        return
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, (TrainableEMA, WeightAveraging)) for callback in callbacks):
        name = "TrainableEMA" if EMA in checkpoint else "EMAWeightAveraging"
        rank_zero_warn(
            f"The checkpoint was trained with {name}: its weights are averaged ones, and the ones that were being "
            f"trained are read by that callback only. Add {name} to the Trainer; without it training goes on from the "
            "averages, with an optimizer state that is not theirs."
        )


def _trainable(pl_module: LightningModule) -> dict[str, int]:
    """Names of the trainable parameters, all names of shared ones, with their place among the parameters."""
    places = {id(p): index for index, p in enumerate(p for p in pl_module.parameters() if p.requires_grad)}
    return {name: places[id(p)] for name, p in pl_module.named_parameters(remove_duplicate=False) if id(p) in places}
