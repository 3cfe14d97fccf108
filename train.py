"""Pretrain GPT-2 with AdamW, Lion, Sophia-H or Sophia-G.

    python train.py [CONFIG.py …] [--name=value …]                        one device
    torchrun --nproc_per_node=8 train.py config/gpt2_small_sophiag.py     eight

`python train.py --help` lists every setting.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from model import GPT, GPTConfig
from training import checkpoints, errors, machine, settings, steps
from training.batches import Batches, check_batch
from training.curvature import Curvature
from training.data import TokenData, open_data
from training.files import check_writable, write_json
from training.metrics import FILE, Metrics, read_rows
from training.optimizers import learning_rate, make_optimizer


def main() -> None:
    # Everything that can be refused is refused before anything is allocated or written.
    s = settings.read(sys.argv[1:])
    check_batch(s, machine.environment_ranks()[1])
    data = open_data(s.dataset, s.block_size)
    out_dir = Path(s.out_dir)
    check_writable(out_dir)
    resumed = checkpoints.newest(out_dir) if s.init_from == "resume" else None
    if resumed and (out_dir / FILE).exists():
        read_rows(out_dir / FILE)
    if not resumed and not s.eval_only and checkpoints.folders(out_dir):
        raise errors.UserError(
            f"{out_dir} holds a run already: go on with --init_from=resume, or take another --out_dir"
        )
    here = machine.set_up(s)

    torch.manual_seed(s.seed)
    progress = resumed.progress if resumed else checkpoints.Progress(started_from=s.init_from)
    model = initial_model(s, data, resumed)
    changes = checkpoints.check_same_run(resumed, model.config, s, data) if resumed else []
    if resumed:
        resumed.load_model(model)
    model.to(here.device)
    model.checkpoint_activations = s.checkpoint_activations
    optimizer = make_optimizer(model, s, here)
    if resumed:
        resumed.load_optimizer(model, optimizer)
    batches = Batches(data, s, here)
    compiled = torch.compile(model, dynamic=False) if here.compile else model
    network = steps.data_parallel(compiled, here)
    curvature = Curvature(model, s, here, batches)
    params = [param for group in optimizer.param_groups for param in group["params"]]

    describe(s, here, model, data, progress, changes)
    if s.eval_only:
        here.note(f"validation loss {steps.validation_loss(compiled, batches):.4f} at step {progress.step}")
        return
    if progress.step >= s.max_iters:
        here.note(f"the run in {out_dir} is complete; a larger max_iters would continue it")
        return
    if here.is_main:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_json(out_dir / "settings.json", dataclasses.asdict(s))
    with Metrics(out_dir, s, progress.step if resumed else -1, here.is_main) as metrics:

        def evaluate() -> float:
            progress.val_loss = steps.validation_loss(compiled, batches)
            if not math.isfinite(progress.val_loss):
                raise divergence(f"the validation loss is {progress.val_loss}", progress.step, out_dir)
            if progress.best_val_loss is None or progress.val_loss < progress.best_val_loss:
                progress.best_val_loss, progress.best_step = progress.val_loss, progress.step
            return progress.val_loss

        def save() -> None:
            if here.is_main:
                checkpoints.save(out_dir, model, optimizer, progress, s, data)

        if not resumed:
            metrics.write({"step": 0, "tokens": 0, "seconds": 0.0, "val/loss": evaluate()})
            save()

        tokens_per_step = s.batch_size * s.block_size
        recent = []  # (loss, gradient norm), on the device, of the steps since the last row
        started, waited = time.perf_counter(), batches.seconds_waited
        for step in range(progress.step + 1, s.max_iters + 1):
            lr = learning_rate(s, step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            if curvature.is_due(step):
                optimizer.update_hessian(curvature.estimate(step, params))
            loss = steps.accumulate_gradients(network, batches, step)
            grad_norm = torch.nn.utils.clip_grad_norm_(params, s.grad_clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            recent.append(torch.stack((loss, grad_norm)))

            evaluating = step % s.eval_interval == 0 or step == s.max_iters
            if step % s.log_interval and not evaluating:
                continue
            # The one place where the host waits for the device.
            window = torch.stack(recent)
            here.sum_over_ranks([window])
            window = (window / here.world_size).tolist()
            recent.clear()
            for earlier, (value, norm) in enumerate(window, start=step - len(window) + 1):
                if not (math.isfinite(value) and math.isfinite(norm)):
                    raise divergence(f"the training loss is {value}, its gradient's norm {norm}", earlier, out_dir)
            seconds = time.perf_counter() - started
            speed = len(window) * tokens_per_step / seconds
            peak = here.peak_flops()
            progress.step = step
            progress.seconds += seconds
            progress.clipped_steps += sum(norm > s.grad_clip > 0 for _, norm in window)
            metrics.write(
                {
                    "step": step,
                    "tokens": step * tokens_per_step,
                    "seconds": progress.seconds,
                    "lr": lr,
                    "train/loss": window[-1][0],
                    "val/loss": evaluate() if evaluating else None,
                    "grad_norm": window[-1][1],
                    "clip_rate": progress.clipped_steps / step,
                    "win_rate": optimizer.unclipped_fraction() if s.optimizer.startswith("sophia") else None,
                    "tokens_per_second": speed,
                    "data_wait": (batches.seconds_waited - waited) / seconds,
                    "mfu": speed * model.flops_per_token() / (peak * here.world_size) if peak else None,
                }
            )
            if evaluating:
                save()
            started, waited = time.perf_counter(), batches.seconds_waited


def initial_model(s: settings.Settings, data: TokenData, resumed: checkpoints.Checkpoint | None) -> GPT:
    """A model of the shape that the settings ask for, or with pretrained weights and their shape."""
    started_from = resumed.progress.started_from if resumed else s.init_from
    if started_from == "scratch":
        names = [field.name for field in dataclasses.fields(GPTConfig) if field.name != "vocab_size"]
        config = GPTConfig(vocab_size=data.padded_vocab_size, **{name: getattr(s, name) for name in names})
    elif resumed:
        config = dataclasses.replace(resumed.config, block_size=s.block_size, dropout=s.dropout)
    else:
        return pretrained_model(s, data)
    try:
        return GPT(config)
    except RuntimeError as error:
        raise errors.UserError(f"the model does not fit into memory: {str(error).splitlines()[0]}") from None


def pretrained_model(s: settings.Settings, data: TokenData) -> GPT:
    if not s.init_from.startswith("gpt2") and not Path(s.init_from).is_dir():
        raise errors.UserError(
            f"init_from = {s.init_from!r}: must be 'scratch', 'resume', a hub name 'gpt2*' or a folder with weights"
        )
    try:
        model = GPT.from_pretrained(s.init_from, s.block_size, s.dropout)
    except (OSError, ValueError) as error:
        raise errors.UserError(f"init_from = {s.init_from!r}: {str(error).splitlines()[0]}") from None
    if model.config.vocab_size < data.vocab_size:
        raise errors.UserError(
            f"{s.init_from} has {model.config.vocab_size} tokens, but the data set {s.dataset} has {data.vocab_size}"
        )
    return model


def describe(s, here, model, data, progress, changes) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    if not data.has_meta:
        here.note(f"{data.folder} has no meta.json: GPT-2's vocabulary of 50257 tokens is assumed")
    if s.warmup_iters > s.max_iters:
        here.note(f"warmup_iters = {s.warmup_iters} is longer than the run: learning_rate is never reached")
    for change in changes:
        here.note(f"resuming with another setting: {change}")
    here.note(
        f"{parameters / 1e6:.1f}M parameters on {here.world_size} x {here.device.type} in {str(here.dtype)[6:]},"
        f" {s.optimizer}, {s.batch_size} x {s.block_size} tokens a step, steps {progress.step} to {s.max_iters}"
    )


def divergence(what: str, step: int, out_dir: Path) -> errors.Diverged:
    found = checkpoints.folders(out_dir)
    kept = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
    return errors.Diverged(
        f"{what} at step {step}: stopped; {kept}; try a lower learning_rate or, with Sophia, a higher rho"
    )


if __name__ == "__main__":
    try:
        errors.run(main)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
