"""Modules whose base has no text encoder: an embedding for each prompt of the data, kept right in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from fairdiff_lightning.networks.prompts import Prompts

TRAINED = "prompts.trained"
"""Where a checkpoint has which learned prompts were trained."""


class LearnedPrompts(LightningModule):
    """Base, beside others and before them, of a module that has ``prompts`` and the hyperparameter ``learned_prompts``.

    Each device marks what its own samples trained, and checkpoints have all of it.
    """

    prompts: Prompts

    def learn_prompts(self, texts: Sequence[str]) -> None:
        """Have an embedding for each text, in this order, which goes into checkpoints beside them."""
        self.prompts.learn(texts)
        self.hparams["learned_prompts"] = self.prompts.learned_texts
        self._ddp_params_and_buffers_to_ignore = [TRAINED]  # DDP would give all devices the marks of the first

    def learn_prompts_of(self, data: object) -> None:
        """Have an embedding for each text that a data module tells of too.

        Raises:
            ValueError: when a callback has copied the module already.
        """
        known = self.prompts.learned
        self.learn_prompts([*self.prompts.learned_texts, *getattr(data, "prompts", ())])
        copied = any(isinstance(one, WeightAveraging) for one in self.trainer.callbacks)  # type: ignore[attr-defined]
        if self.prompts.learned is not known and copied:
            raise ValueError(
                "Lightning's weight averaging copied the module before the data module told its prompts, whose "
                "embeddings it would lack: average with TrainableEMA, or give "
                f"learned_prompts={self.prompts.learned_texts}."
            )

    def check_trained(self, rows: Tensor, guided: bool) -> None:
        """Refuse to sample with prompts that nothing was learned for; while training goes on, a warning tells of them.

        Args:
            rows: see :meth:`Prompts.rows`.
            guided: whether guidance leads away from the empty prompt.
        """
        try:
            self.prompts.check_trained(torch.cat([rows, rows.new_full((int(guided),), -1)]))
        except ValueError as error:
            if not self._fits():
                raise
            rank_zero_warn(f"validation samples: {error}")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Have an embedding for each text that the checkpoint has one for.

        Raises:
            ValueError: when training would go on with others beside.
        """
        if self.prompts.learned is not None:
            known = checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY].get("learned_prompts") or []
            new = sorted(set(self.prompts.learned_texts) - set(known))
            if new and self._fits():
                raise ValueError(
                    f"this run would learn the prompts {new} beside those of the checkpoint that it resumes from, "
                    f"{known}; the optimizer's state is of these alone. Start a new run from the weights "
                    "(load_from_checkpoint, then fit), or resume with the data that the run began with."
                )
            self.learn_prompts(known)
        super().on_load_checkpoint(checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what all devices trained."""
        super().on_save_checkpoint(checkpoint)
        if TRAINED in checkpoint["state_dict"] and self._trainer is not None:
            own = checkpoint["state_dict"][TRAINED].float()
            total = cast(Tensor, self.trainer.strategy.reduce(own, reduce_op="sum"))
            checkpoint["state_dict"][TRAINED] = total.bool()

    def _fits(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
