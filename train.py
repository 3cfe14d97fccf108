"""Pretrain GPT-2 with AdamW, Lion, Sophia-H or Sophia-G.

    python train.py [CONFIG.py …] [--name=value …]                        one device
    torchrun --nproc_per_node=8 train.py config/gpt2_small_sophiag.py     eight

`python train.py --help` lists every setting.
"""

import dataclasses
import math
import os
import sys
import time

import torch
import torch.distributed as dist

from model import GPT, GPTConfig
from records import checkpoints
from records.metrics import Metrics
from records.run_folder import RunFolder
from run import errors, machine, ranks, settings, signals
from tokens.batches import Batches, check_batch
from tokens.token_files import TokenData, open_data
from training import optimizers, steps
from training.curvature import Curvature


def main() -> None:
    # Everything that can be refused is refused before anything is allocated or written.
    s = settings.read(sys.argv[1:])
    rank, count = ranks.environment()
    check_batch(s, count)
    data = open_data(s.dataset, s.block_size)
    with RunFolder(s) as folder:
        resumed = folder.checkpoint() if rank == 0 else None
        train(s, data, folder, resumed)


def train(s: settings.Settings, data: TokenData, folder: RunFolder, resumed: checkpoints.Checkpoint | None) -> None:
    """The run, of which rank 0 alone reads and writes the folder; `resumed` is the checkpoint it found there."""
    here = machine.set_up(s)
    check_same_job(s, data, here)
    torch.manual_seed(s.seed)
    resumed = here.ranks.share(resumed)
    model = initial_model(s, data, resumed)
    changes = checkpoints.check_same_run(resumed, model.config, s, data) if resumed else []
    if resumed and here.ranks.is_main:
        resumed.load_model(model)
    model.to(here.device)
    for parameter in model.parameters():
        here.ranks.broadcast(parameter.detach())
    model.checkpoint_activations = s.checkpoint_activations
    optimizer = optimizers.make_optimizer(model, s, here)
    if resumed:
        state = resumed.optimizer_state(model) if here.ranks.is_main else None
        optimizers.load_state(model, optimizer, state, here.ranks, here.device)
        del state
    progress = resumed.progress if resumed else checkpoints.Progress(started_from=started_from(s))
    batches = Batches(data, s, here)
    curvature = Curvature(model, s, here, batches)
    if here.compile:
        model.compile(dynamic=False)

    describe(s, here, model, data, progress, changes)
    if s.eval_only:
        here.note(f"validation loss {steps.validation_loss(model, batches):.4f} at step {progress.step}")
        return
    if progress.step >= s.max_iters:
        here.note(f"the run in {folder.path} is complete; a larger max_iters would continue it")
        return
    if here.ranks.is_main:
        folder.begin(resumed)
    kept_steps = progress.step if resumed else -1
    with (
        Metrics(folder.path, s, kept_steps, here.ranks.is_main) as metrics,
        checkpoints.Writer(folder.path, model, optimizer, s, data, here) as writer,
        signals.Preemption(here.note) as preemption,
    ):

        def evaluate() -> float:
            progress.val_loss = steps.validation_loss(model, batches)
            if not math.isfinite(progress.val_loss):
                raise divergence(f"the validation loss is {progress.val_loss}", progress.step, writer)
            if progress.best_val_loss is None or progress.val_loss < progress.best_val_loss:
                progress.best_val_loss, progress.best_step = progress.val_loss, progress.step
            return progress.val_loss

        if not resumed:
            metrics.write({"step": 0, "tokens": 0, "seconds": 0.0, "val/loss": evaluate()})
            writer.begin(progress)
            writer.finish_or_fail()  # what cannot be written now will hardly be written later

        tokens_per_step = s.batch_size * s.block_size
        recent = []  # what the updates since the last row returned, still on the device
        stopping = False
        started, waited = time.perf_counter(), batches.seconds_waited
        for step in range(progress.step + 1, s.max_iters + 1):
            recent.append(steps.update(step, model, optimizer, batches, curvature, writer.wait_for_copies))

            stopping = here.ranks.any(preemption.asked is not None)
            evaluating = step % s.eval_interval == 0 or step == s.max_iters
            logging = step % s.log_interval == 0 or evaluating
            if not (logging or stopping):
                continue
            # The one place where the host waits for the device.
            parts = here.ranks.gather(torch.stack(recent)).cpu()  # (ranks, steps, 3)
            recent.clear()
            window = torch.stack((parts[:, :, 0].sum(0), parts[0, :, 2]), dim=1).tolist()
            for earlier, (loss, norm) in enumerate(window):
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    what = f"the training loss is {loss}, its gradient's norm {norm}{culprits(parts[:, earlier], here)}"
                    raise divergence(what, step - len(window) + 1 + earlier, writer)
            seconds = time.perf_counter() - started
            speed = len(window) * tokens_per_step / seconds
            peak = here.peak_flops()
            progress.step = step
            progress.seconds += seconds
            progress.clipped_steps += sum(norm > s.grad_clip > 0 for _, norm in window)
            sophia = s.optimizer.startswith("sophia")
            if logging:
                metrics.write(
                    {
                        "step": step,
                        "tokens": step * tokens_per_step,
                        "seconds": progress.seconds,
                        "lr": optimizers.learning_rate(s, step),
                        "train/loss": window[-1][0],
                        "val/loss": evaluate() if evaluating else None,
                        "grad_norm": window[-1][1],
                        "clip_rate": progress.clipped_steps / step,
                        "win_rate": optimizers.unclipped_fraction(optimizer, here.ranks) if sophia else None,
                        "tokens_per_second": speed,
                        "data_wait": (batches.seconds_waited - waited) / seconds,
                        "mfu": speed * model.flops_per_token() / (peak * here.ranks.count) if peak else None,
                    }
                )
            if evaluating or stopping:
                writer.begin(progress)
            if stopping:
                break
            started, waited = time.perf_counter(), batches.seconds_waited

        writer.finish_or_fail()
        if stopping and progress.step < s.max_iters:
            here.note(
                f"{preemption.asked or 'a signal to another rank'}: stopped after step {progress.step}, whose"
                f" checkpoint is written; the same command with --init_from=auto goes on"
            )
            sys.exit(signals.EXIT_CODE)


def initial_model(s: settings.Settings, data: TokenData, resumed: checkpoints.Checkpoint | None) -> GPT:
    """A model of the shape that the settings ask for, or with pretrained weights and their shape."""
    if (resumed.progress.started_from if resumed else started_from(s)) == "scratch":
        names = [field.name for field in dataclasses.fields(GPTConfig) if field.name != "vocab_size"]
        config = GPTConfig(vocab_size=data.padded_vocab_size, **{name: getattr(s, name) for name in names})
    elif resumed:
        config = dataclasses.replace(resumed.config, block_size=s.block_size, dropout=s.dropout)
    else:
        return pretrained_model(s, data)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * config.parameters > memory:
        raise errors.UserError(
            f"the model does not fit into memory: {config.parameters:.3g} weights of 4 bytes, but there are"
            f" {memory / 1e9:.0f} GB; lower n_layer, n_embd or block_size"
        )
    try:
        return GPT(config)
    except RuntimeError as error:
        raise errors.UserError(f"the model does not fit into memory: {str(error).splitlines()[0]}") from None


def started_from(s: settings.Settings) -> str:
    return "scratch" if s.init_from == "auto" else s.init_from


def pretrained_model(s: settings.Settings, data: TokenData) -> GPT:
    # os.path, unlike pathlib, takes what cannot be looked at for what is not there
    if not s.init_from.startswith("gpt2") and not os.path.isdir(s.init_from):
        raise errors.UserError(
            f"init_from = {s.init_from!r}: must be 'scratch', 'resume', 'auto', a hub name 'gpt2*' or a folder"
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
        f"{parameters / 1e6:.1f}M parameters on {here.ranks.count} x {here.device.type} in {str(here.dtype)[6:]},"
        f" {s.optimizer}, {s.batch_size} x {s.block_size} tokens a step, steps {progress.step} to {s.max_iters}"
    )


def culprits(parts: torch.Tensor, here: machine.Machine) -> str:
    """The ranks whose own part (loss, gradient norm) of a step is not finite, where others' are."""
    bad = (~parts[:, :2].isfinite().all(dim=1)).nonzero().flatten().tolist()
    if len(bad) in (0, here.ranks.count):
        return ""
    return f", because of {', '.join(map(here.ranks.name, bad))} alone: is that device in order?"


def divergence(what: str, step: int, writer: checkpoints.Writer) -> errors.Diverged:
    writer.finish()
    return errors.Diverged(
        f"{what} at step {step}: stopped; {checkpoints.last_kept(writer.out_dir)}; try a lower learning_rate or, with"
        f" Sophia, a higher rho"
    )


def check_same_job(s: settings.Settings, data: TokenData, here: machine.Machine) -> None:
    """Refuse a rank that was started with other settings or other data than rank 0."""
    mine = dataclasses.asdict(s) | {"the data set's fingerprint": data.fingerprint()}
    for name, value in here.ranks.share(mine).items():
        if mine[name] != value:
            raise errors.RankError(f"{name} = {mine[name]!r}, but rank 0 was started with {value!r}")


if __name__ == "__main__":
    sys.stdout, sys.stderr = errors.Unbreakable(sys.stdout), errors.Unbreakable(sys.stderr)
    errors.run(main)
    # Not after a failure: with a rank lost, leaving in good order could wait for it for ever.
    if dist.is_initialized():
        dist.destroy_process_group()
