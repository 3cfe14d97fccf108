"""Pretrain GPT-2 with AdamW, Lion, Muon, Sophia-H or Sophia-G.

    python train.py [CONFIG.py …] [--name=value …]                        one device
    torchrun --nproc_per_node=8 train.py config/gpt2_small_sophiag.py     eight

`python train.py --help` lists every setting.
"""

import math
import sys

import torch
from torch import Tensor, nn

from data.token_files import TokenData, open_data
from model import GPT
from run.errors import Diverged, Unbreakable, run
from run.machine import Machine, set_up
from run.randomness import seed_dropout
from run.ranks import environment, leave
from run.settings import Settings, read
from run.signals import EXIT_CODE, StopSignals
from training.batches import Batches, check_batch
from training.checkpoint_writer import CheckpointWriter
from training.checkpoints import Checkpoint, Progress, last_good
from training.curvature import Curvature
from training.meter import Meter, StepResult
from training.metrics import Metrics
from training.optimizers import Optimizer, betas, learning_rate, load_state, make_optimizer, parameters
from training.start import RunFolder, as_used, check_same_job, describe, form_buckets, make_model, wrap


def update(step: int, model: nn.Module, optimizer: Optimizer, batches: Batches, curvature: Curvature) -> StepResult:
    """Update `step` (from 1) of the weights, without waiting for the device."""
    settings, params = batches.settings, parameters(optimizer)
    for group in optimizer.param_groups:
        group["lr"], group["betas"] = learning_rate(settings, step), betas(settings, step)
    if curvature.is_due(step):
        optimizer.update_hessian(curvature.estimate(step, params))
    loss = accumulate_gradients(step, model, batches)
    norm = torch.nn.utils.clip_grad_norm_(params, settings.grad_clip or math.inf)
    optimizer.step()
    model.zero_grad(set_to_none=batches.machine.ranks.world_size == 1)  # DDP's are parts of its buckets, and stay there
    return StepResult(loss, norm)


def accumulate_gradients(step: int, model: nn.Module, batches: Batches) -> Tensor:
    """Leave the gradient of the batch's mean loss, over all ranks, in .grad. Returns this rank's mean loss."""
    settings, machine = batches.settings, batches.machine
    if settings.dropout > 0:
        seed_dropout(settings.seed, step, machine.ranks.rank)
    total = torch.zeros((), device=machine.device)
    for number, (x, y) in enumerate(batches.train(step), start=1):
        model.require_backward_grad_sync = number == batches.accumulation_steps  # DDP averages at the last one only
        with machine.forward_context():
            loss = model(x, y) / batches.accumulation_steps
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(model: GPT, batches: Batches) -> float:
    """Mean cross-entropy in nats over the fixed validation blocks, which the ranks share."""
    machine = batches.machine
    wide = torch.float32 if machine.device.type == "mps" else torch.float64
    sums = torch.zeros(2, dtype=wide, device=machine.device)  # losses, tokens
    model.eval()
    for x, y in batches.validation():
        with machine.forward_context():
            loss = model(x, y)
        tokens = (y >= 0).sum()
        sums += torch.stack((loss * tokens, tokens))
    model.train()
    machine.ranks.all_reduce([sums])
    loss, tokens = sums.tolist()
    return loss / tokens


def main() -> None:
    # Check all input before anything is allocated or written.
    settings = read(sys.argv[1:])
    rank, count = environment()
    check_batch(settings, count)
    data = open_data(settings.dataset, settings.block_size)
    with RunFolder(settings) as folder:
        checkpoint = folder.checkpoint_to_resume() if rank == 0 else None  # rank 0 alone reads and writes the folder
        machine = set_up(settings)
        try:
            train(settings, data, folder, machine, checkpoint)
        except Diverged as error:
            advice = "try a lower learning_rate or, with Sophia, a higher rho"
            raise Diverged(f"{error}; {last_good(folder.path)}; {advice}") from None


def train(settings: Settings, data: TokenData, folder: RunFolder, machine: Machine, found: Checkpoint | None) -> None:
    check_same_job(settings, data, machine)
    checkpoint = machine.ranks.broadcast_object(found)
    torch.manual_seed(settings.seed)
    model = make_model(settings, data, machine, checkpoint)
    settings = as_used(settings, model, checkpoint)
    parallel = wrap(model, machine)
    optimizer = make_optimizer(model, settings, machine)
    progress = checkpoint.progress if checkpoint else Progress(settings.init_from)
    if checkpoint:
        load_state(model, optimizer, checkpoint.optimizer_state() if machine.ranks.is_main else {}, machine.ranks)
    batches = Batches(data, settings, machine)
    curvature = Curvature(model, settings, machine, batches)

    describe(settings, data, machine, model, checkpoint)
    if settings.eval_only:
        machine.note(f"validation loss {evaluate(model, batches):.4f} at step {progress.step}")
        return
    if progress.step >= settings.max_iters:
        machine.note(f"the run in {folder.path} is complete; a larger max_iters would continue it")
        return
    if machine.ranks.is_main:
        folder.begin(checkpoint, settings)
    with (
        Metrics(folder.path, settings, progress.step, checkpoint is not None, machine.ranks.is_main) as metrics,
        CheckpointWriter(folder.path, model, optimizer, settings, data, machine.ranks) as writer,
        StopSignals(machine.ranks, machine.note) as signals,
    ):
        form_buckets(parallel, machine, (settings.micro_batch_size, settings.block_size))
        meter = Meter(settings, machine, batches, progress, model.flops_per_token())
        if not checkpoint:
            val_loss = meter.record_validation(evaluate(model, batches))
            metrics.write({"step": 0, "tokens": 0, "seconds": 0.0, "flops": 0, "val/loss": val_loss})
            writer.begin(progress)
            writer.finish_or_fail()  # fail now if the folder cannot hold a checkpoint
        meter.restart()
        for step in range(progress.step + 1, settings.max_iters + 1):
            meter.results.append(update(step, parallel, optimizer, batches, curvature))
            stopping = signals.stop_requested()
            evaluating = step % settings.eval_interval == 0 or step == settings.max_iters
            logging = step % settings.log_interval == 0 or evaluating
            if not (logging or stopping):
                continue
            row = meter.finish_row(step)
            if evaluating:
                row["val/loss"] = meter.record_validation(evaluate(model, batches))
            row["win_rate"] = optimizer.unclipped_fraction() if settings.uses_curvature else None
            if logging:
                metrics.write(row)
            if evaluating or stopping:
                writer.begin(progress)
            if stopping:
                break
            meter.restart()
        writer.finish_or_fail()
    if stopping and progress.step < settings.max_iters:
        why = f"{signals.asked or 'a signal to another rank'}: stopped after step {progress.step}"
        machine.note(f"{why}, whose checkpoint is written; the same command with --init_from=auto goes on")
        sys.exit(EXIT_CODE)
    machine.note(f"done: {folder.path} has checkpoints/, metrics.jsonl and settings.json; plot.py draws the losses")


if __name__ == "__main__":
    sys.stdout, sys.stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    try:
        run(main)
        leave(0)
    except SystemExit as stop:
        leave(stop.code)
