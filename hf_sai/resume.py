"""A Trainer that resumes only from complete checkpoints, loads every weight, and works with any number of processes."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer

from hf_sai.checkpoints import TRAINER_STATE, last_whole_checkpoint, remove_random_states


class ResumingTrainer(Trainer):
    """The saving and resuming of :class:`hf_sai.SaITrainer`, with any optimizer."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **kwargs: Any) -> Any:
        """Like ``Trainer.train``. ``True`` resumes from the last complete checkpoint.

        Args:
            resume_from_checkpoint: a folder, or whether to resume. If a newer checkpoint is incomplete, a warning names
                it. The number of processes may differ from that of the saved run.
            rest: see ``Trainer.train``.
            kwargs: see ``Trainer.train``.

        Raises:
            ValueError: if there is no complete checkpoint, or if the folder lacks the state of the optimizer or the
                scheduler.
        """
        if resume_from_checkpoint is True:
            folder = str(self.args.output_dir)
            resume_from_checkpoint = last_whole_checkpoint(folder)
            if resume_from_checkpoint is None:
                raise ValueError(f"resume_from_checkpoint=True found no complete checkpoint in {folder!r}")
        if resume_from_checkpoint and not self.is_deepspeed_enabled:
            # transformers would silently start with a new optimizer.
            for what in ("optimizer", "scheduler"):
                if not any(Path(resume_from_checkpoint).glob(f"*{what}*")):
                    raise ValueError(
                        f"resume_from_checkpoint {str(resume_from_checkpoint)!r} contains no {what} state; to "
                        "continue from its weights only, load them with from_pretrained and remove "
                        "resume_from_checkpoint"
                    )
        return super().train(resume_from_checkpoint, *rest, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the checkpoint like ``Trainer``, and make sure that no weight is missing.

        transformers 5 saves the weights of some models (ViT) with old names, but looks for the new names when it
        resumes. It only logs that weights are missing, and trains with initial weights. ``from_pretrained`` handles
        both names.

        Raises:
            ValueError: if weights are missing and the model has no ``from_pretrained``.
        """
        self._missing_weights: list[str] = []
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        if not self._missing_weights:
            return
        if self.is_fsdp_enabled or not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"checkpoint {str(resume_from_checkpoint)!r} lacks weights of this model: "
                f"{', '.join(self._missing_weights[:3])}; resume with the model that was saved"
            )
        model.load_state_dict(type(model).from_pretrained(resume_from_checkpoint).state_dict())

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if hasattr(self.model, "_keys_to_ignore_on_save"):  # otherwise the Trainer's method raises an AttributeError
            super()._issue_warnings_after_load(load_result)
        left_out = getattr(self.model, "_keys_to_ignore_on_save", None) or ()
        self._missing_weights = [key for key in load_result.missing_keys if key not in left_out]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            # While a checkpoint overwrites an older one, the mixture of both must not count as complete.
            (folder / TRAINER_STATE).unlink(missing_ok=True)
            remove_random_states(folder, world_size=self.args.world_size)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # trainer_state.json is written next. It marks the checkpoint as complete, so all processes must finish first.
        self.accelerator.wait_for_everyone()
