"""LoRA fine-tuning of Stable Diffusion on a visual concept, with a new token for it (section 5.3.2 of the paper).

    python -m recipes.diffusion --data photos/ --concept_init dog --validation_prompts "a pencil sketch of <V>"
    accelerate launch --config_file accelerate_configs/ddp.yaml -m recipes.diffusion --config ...

Writes to `output_dir`: `lora/` (for `load_lora_weights` and `load_textual_inversion`, with a model card), `samples/`
with `grid.png`, `record.json`, and checkpoints.
"""

import functools
import hashlib
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import Tensor
from tqdm import tqdm
from transformers import SchedulerType, get_scheduler

from hf_sai.bench.state_bytes import optimizer_state_bytes
from recipes.common.config import parse_config
from recipes.common.errors import UserError, start_logging
from recipes.common.files import check_writable, write_json, write_text
from recipes.common.measure import StepTimer
from recipes.common.models import check_model
from recipes.common.optimizers import OptimizerArguments, build_optimizer
from recipes.common.provenance import Began, run_record
from recipes.common.records import public_settings
from recipes.common.run_folder import run_folder
from recipes.diffusion.card import model_card
from recipes.diffusion.checkpoint import last_checkpoint, load_checkpoint, save_checkpoint, save_only_what_trains
from recipes.diffusion.config import DiffusionArguments
from recipes.diffusion.data import Example, load_examples, open_image
from recipes.diffusion.loss import LossByTimestep, draw_noise, min_snr_weights, sample_losses, target_of
from recipes.diffusion.model import (
    TEXT_TARGETS,
    UNET_TARGETS,
    ConceptModel,
    add_concepts,
    add_lora,
    load_concept,
    load_pipeline,
    save_concept,
    text_parts,
    trained_parts,
    training_schedule,
)
from recipes.diffusion.samples import sample, save_picture
from recipes.diffusion.source import Source
from recipes.diffusion.validation import Validation, new_accelerator, track

logger = logging.getLogger(__name__)


def prior_examples(config: DiffusionArguments, pipe: Any, accelerator: Accelerator, size: int) -> list[Example]:
    """Images of the class, to keep the model from forgetting it: given, or drawn by the model before it is trained."""
    if config.prior_prompt is None:
        return []
    how = (config.model, config.prior_prompt, size, config.inference_steps, config.guidance_scale, config.seed)
    made = f"prior-{hashlib.sha256(repr(how).encode()).hexdigest()[:8]}"  # never those of another prompt or model
    folder = Path(config.prior_data or Path(config.output_dir) / made)
    if config.prior_data is None:
        mine = [
            i
            for i in range(accelerator.process_index, config.prior_images, accelerator.num_processes)
            if not (folder / f"{i:05d}.png").is_file()
        ]
        for i in tqdm(mine, desc="class images", disable=not accelerator.is_main_process):
            seed = [config.seed + 1_000_000 + i]
            [picture] = sample(
                pipe, [config.prior_prompt], seed, config.inference_steps, config.guidance_scale, 1, size
            )
            save_picture(picture, folder / f"{i:05d}.png")
        accelerator.wait_for_everyone()
    return load_examples(str(folder), config.prior_prompt, on_bad_image=config.on_bad_image)


def add_trained_parts(pipe: Any, config: DiffusionArguments) -> None:
    """Freeze the pipeline, then give it the LoRA and the new tokens: the only parts that train, in float32."""
    for part in (pipe.unet, pipe.vae, *text_parts(pipe)[1]):
        part.requires_grad_(False)
    set_seed(config.seed)  # the same LoRA on every process
    alpha = config.lora_alpha or config.lora_r
    add_lora(pipe.unet, config.lora_r, alpha, config.lora_dropout, UNET_TARGETS)
    if config.text_lora:
        for encoder in text_parts(pipe)[1]:
            add_lora(encoder, config.lora_r, alpha, config.lora_dropout, TEXT_TARGETS)
    if config.concept_tokens:  # after the LoRA, which freezes all else
        add_concepts(pipe, config.concept_tokens, config.concept_init or [], config.seed)


def check_captions(examples: list[Example], tokens: list[str]) -> None:
    """Every new token must be in some caption, or it would never train."""
    for token in tokens:
        if not any(token in example.caption for example in examples):
            raise UserError(
                f"data: no caption contains the concept token {token}; write it into the captions "
                f"(the first is {examples[0].caption!r}), or set --concept_tokens"
            )


def losses_of_batch(
    model: Any, batches: list[dict[str, Any]], sources: list[Source], schedule: Any, config: DiffusionArguments
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss to minimise, and for the log each sample's unweighted loss and timestep, both (n,).

    Args:
        model: the prepared `ConceptModel`.
        batches: of the concept, and of the class with prior preservation.
        sources: theirs.
        schedule: the training noise schedule.
        config: of the run.
    """
    pairs = list(zip(batches, sources, strict=True))
    parts = []
    for i, (batch, source) in enumerate(pairs):
        mean, std = source.posterior(batch)
        noise, timesteps, spread = draw_noise(
            batch["number"].tolist(),
            mean.shape[1:],
            schedule.config.num_train_timesteps,
            seed=2 * config.seed + i,  # other noise for the class than for the concept
            offset=config.noise_offset,
        )
        parts.append((mean + std * spread.to(std.device), noise.to(std.device), timesteps.to(std.device)))
    latents, noise, timesteps = (torch.cat(part) for part in zip(*parts, strict=True))
    device = latents.device
    text = [torch.cat([s.text[k][b["index"]] for b, s in pairs]).to(device) for k in range(len(sources[0].text))]
    pooled = None
    if sources[0].pooled is not None:
        pooled = torch.cat([s.pooled[b["index"]] for b, s in pairs if s.pooled is not None]).to(device)
    sizes = torch.cat([batch["sizes"] for batch in batches]).to(device)

    prediction = model(schedule.add_noise(latents, noise, timesteps), timesteps, text, pooled, sizes)
    losses = sample_losses(prediction, target_of(schedule, latents, noise, timesteps))
    weighted = losses * min_snr_weights(schedule, timesteps, config.snr_gamma) if config.snr_gamma else losses
    concept, *others = weighted.split([len(batch["number"]) for batch in batches])
    loss = concept.mean() + sum(config.prior_weight * other.mean() for other in others)
    return loss, losses.detach(), timesteps


def check_schedule(args: OptimizerArguments) -> None:
    """Refuse an unknown schedule before the model is loaded, not after."""
    try:
        SchedulerType(args.lr_scheduler_type)
    except ValueError as error:
        known = ", ".join(kind.value for kind in SchedulerType)
        raise UserError(f"lr_scheduler_type must be one of {known}, got {args.lr_scheduler_type!r}") from error


def optimizer_of(model: ConceptModel, args: OptimizerArguments) -> torch.optim.Optimizer:
    """`build_optimizer`; an optimizer whose package is missing is an error without a traceback."""
    try:
        return build_optimizer(model, args)
    except ImportError as error:  # transformers' message says what to install
        raise UserError(f"optim: {getattr(args.optim, 'value', args.optim)} is not available here: {error}") from error


def fine_tune(config: DiffusionArguments, args: OptimizerArguments) -> dict[str, Any]:
    """Train, draw samples, save; returns the record, on every process.

    Raises:
        UserError: bad data, model or settings, or an `output_dir` that holds or is held by another run.
    """
    if config.record:
        check_writable("record", Path(config.record).parent)
    check_schedule(args)
    check_model(config.model, "model_index.json")
    last = functools.partial(last_checkpoint, Path(config.output_dir))
    with run_folder(config.output_dir, config.resume_from_checkpoint, last, config.overwrite_output_dir) as checkpoint:
        return _fine_tune(config, args, Path(checkpoint) if checkpoint else None)


def _fine_tune(config: DiffusionArguments, args: OptimizerArguments, checkpoint: Path | None) -> dict[str, Any]:
    output_dir = Path(config.output_dir)
    accelerator = new_accelerator(
        config.report_to,
        output_dir / "logs",
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("mixed_precision: fp16 needs a GPU; use bf16 or no on a CPU")
    began = Began()
    sharded = accelerator.distributed_type == DistributedType.FSDP
    samples_per_step = (
        config.per_device_train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    )

    with accelerator.local_main_process_first():
        examples = load_examples(
            config.data,
            config.caption,
            config.split,
            config.image_column,
            config.caption_column,
            config.on_bad_image,
            config.max_image_pixels,
        )
        check_captions(examples, config.concept_tokens)
        pipe = load_pipeline(config.model, config.revision, config.variant)
    size = resolution(pipe, config.resolution)
    pipe.to(accelerator.device)
    class_examples = prior_examples(config, pipe, accelerator, size)
    add_trained_parts(pipe, config)
    set_seed(config.seed, device_specific=True)  # dropout: another one on each process
    if accelerator.mixed_precision != "no" and not sharded:  # FSDP wants one dtype, and casts by its own policy
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}[accelerator.mixed_precision]
        for p in (p for part in (pipe.unet, *text_parts(pipe)[1]) for p in part.parameters() if not p.requires_grad):
            p.data = p.data.to(half)
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()

    sources = [Source(found, pipe, config, size) for found in (examples, class_examples) if found]
    schedule = training_schedule(pipe)
    model = ConceptModel(pipe.unet, [] if config.cache_prompts else text_parts(pipe)[1])
    optimizer = optimizer_of(model, args)
    model, optimizer = accelerator.prepare(model, optimizer)
    # Not prepared: accelerate would step it once for each process.
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.warmup_steps, config.max_steps)
    accelerator.register_for_checkpointing(scheduler)
    save_only_what_trains(accelerator)

    progress: dict[str, Any] = {"step": 0, "samples_per_step": samples_per_step, "history": []}
    if checkpoint:
        progress = load_checkpoint(accelerator, checkpoint, samples_per_step)
    if config.report_to:
        scalars = {k: v for k, v in public_settings(config, args).items() if isinstance(v, bool | int | float | str)}
        accelerator.init_trackers("diffusion_lora", config=scalars)
    validation = Validation(config, output_dir / "samples", size, progress["step"], scores=accelerator.is_main_process)
    timer, by_timestep = StepTimer(), LossByTimestep(schedule.config.num_train_timesteps, accelerator.device)
    pictures: list[Any] = []

    def look(step: int) -> None:
        # The live model is in pieces under FSDP: there the samples come at the end, from what was saved.
        if not validation.due(step) or sharded:
            return
        model.eval()
        if accelerator.is_main_process:
            with accelerator.autocast():
                pictures[:] = validation.draw(pipe, step)
            track(accelerator.trackers, validation.folder / "grid.png", step)
        accelerator.wait_for_everyone()
        model.train()

    began.note(optimizer, accelerator.device, progress["step"], pipe.tokenizer)
    model.train()
    if not checkpoint:
        look(0)
    bar = tqdm(
        total=config.max_steps, initial=progress["step"], desc="train", disable=not accelerator.is_local_main_process
    )
    micro = config.gradient_accumulation_steps
    first, last = progress["step"] * micro, config.max_steps * micro
    for number, batches in enumerate(zip(*(s.batches(first, last, accelerator) for s in sources), strict=True), first):
        if number % micro == 0:
            timer.start()
        with accelerator.accumulate(model):
            loss, losses, timesteps = losses_of_batch(model, list(batches), sources, schedule, config)
            by_timestep.add(losses, timesteps)
            accelerator.backward(loss)
            if accelerator.sync_gradients and config.max_grad_norm:
                accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.max_grad_norm)
            if accelerator.sync_gradients:
                timer.before_update()
            optimizer.step()
            if accelerator.sync_gradients:
                timer.after_update()
                if not accelerator.optimizer_step_was_skipped:
                    scheduler.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        timer.stop()
        bar.update()
        step = progress["step"] = progress["step"] + 1
        saves = config.save_steps > 0 and step % config.save_steps == 0
        if step % config.logging_steps == 0 or saves or step == config.max_steps:
            log = {"lr": scheduler.get_last_lr()[0], **by_timestep.take(accelerator)}
            progress["history"].append({"step": step, **log})
            bar.set_postfix(loss=f"{log['loss']:.4f}")
            accelerator.log(log, step=step)
            was_finite = all(math.isfinite(float(earlier["loss"])) for earlier in progress["history"][:-1])
            if not math.isfinite(log["loss"]) and was_finite:
                logger.warning("the loss is not finite at step %d: lower learning_rate or set max_grad_norm", step)
        look(step)
        if saves:
            save_checkpoint(accelerator, output_dir, progress, config.save_total_limit)
    bar.close()

    trained = trained_parts(pipe, config.concept_tokens)  # on every process: it gathers what is sharded
    record: dict[str, Any] = {}
    if accelerator.is_main_process:
        lora = output_dir / "lora"
        in_one_piece(lora, lambda folder: save_concept(folder, pipe, trained))
        if sharded and validation.due(config.max_steps):
            fresh = load_pipeline(config.model, config.revision, config.variant).to(accelerator.device)
            load_concept(fresh, lora)
            pictures[:] = validation.draw(fresh, config.max_steps)
        references = [open_image(example.source) for example in examples] if config.clip_model else []
        record = run_record(
            "diffusion",
            (config, args),
            began,
            processes=accelerator.num_processes,
            steps=progress["step"],
            samples_per_step=samples_per_step,
            images=len(examples),
            concept=dict(zip(config.concept_tokens, config.concept_init or [], strict=True)),
            captions=sorted({example.caption for example in examples}),
            text_encoders=len(text_parts(pipe)[1]),
            resolution=size,
            trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            optimizer_state_bytes=optimizer_state_bytes(optimizer),
            scores=validation.score(pictures, references, accelerator.device) if pictures else {},
            time=timer.summary(),
            history=progress["history"],
        )
        if pictures:
            shutil.copy(validation.folder / "grid.png", lora / "grid.png")
        write_text(lora / "README.md", str(model_card(record, config, "grid.png" if pictures else None)))
        write_json(output_dir / "record.json", record)
        if config.record:
            write_json(config.record, record)
        accelerator.print(f"LoRA, record and samples: {output_dir}")
    accelerator.wait_for_everyone()
    accelerator.end_training()  # last: it closes the trackers, and the process group with them
    return record


def resolution(pipe: Any, wanted: int | None) -> int:
    """The side of the images in pixels: as asked for, or what the UNet was trained at."""
    if wanted is None:
        return pipe.unet.config.sample_size * pipe.vae_scale_factor
    step = max(8, pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1))
    if wanted < step or wanted % step:
        raise UserError(f"resolution must be a multiple of {step} for this model, got {wanted}")
    return wanted


def in_one_piece(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder under a temporary name, then put it in the place of `folder`."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def run(words: Sequence[str] | None = None) -> dict[str, Any]:
    """`fine_tune` with the settings of command-line words, by default those of the process."""
    config, args = parse_config([DiffusionArguments, OptimizerArguments], words, description=__doc__)
    return fine_tune(config, args)


def main() -> None:
    start_logging()
    run()
