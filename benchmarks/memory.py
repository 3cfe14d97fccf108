"""What a training step needs of memory, and the largest micro-batch that a GPU has room for."""

import dataclasses
from argparse import Namespace

import torch

from benchmarks.common import make_model, random_tokens
from benchmarks.speed import Contender, our_step
from model import CPU_LOGITS, LOGITS
from training import errors, machine
from training.batches import Batches
from training.optimizers import STATE
from training.settings import Settings, read

GPUS = (24, 40, 80, 141)  # GB, of 1e9 bytes
RESERVE = 0.1  # of a GPU's memory: CUDA's own, what the allocator cannot use, and curvature's directions
BFLOAT16 = 2  # bytes


def memory_benchmark(options: Namespace, arguments: list[str], here: machine.Machine) -> dict:
    """The largest micro-batch for GPUS, computed from the tensors that the compiled model keeps for its backward pass;
    on CUDA also the largest one that runs. On a CPU the computed bytes stand beside the measured ones of a step.
    """
    s = read(arguments)
    fixed, sequence = computed(s, here)
    result = {"fixed_bytes": fixed + 2 * BFLOAT16 * LOGITS, "bytes_per_sequence": sequence}
    for size in GPUS:
        room = (1 - RESERVE) * size * 1e9 - result["fixed_bytes"]
        result[f"micro_batch_size_{size}_GB_computed"] = max(int(room / sequence), 0)
    if here.device.type == "cuda":
        largest, failed = 0, 0  # double until one fails, then halve the gap
        while not failed or failed - largest > 1:
            size = (largest + failed) // 2 if failed else max(2 * largest, 1)
            peak = peak_of_steps(arguments, size)
            if peak is None:
                failed = size
            else:
                largest, result["peak_bytes"] = size, peak
        result["micro_batch_size_measured"] = largest
    else:
        one, other = (peak_of_steps(arguments, size * s.micro_batch_size) for size in (1, 2))
        if one is None or other is None:
            raise errors.UserError(f"micro_batch_size = {2 * s.micro_batch_size}: too much for the memory here")
        computed_bytes = fixed + 2 * BFLOAT16 * CPU_LOGITS + s.micro_batch_size * sequence
        result |= {"peak_bytes": one, "peak_bytes_computed": computed_bytes}
        result["bytes_per_sequence_measured"] = (other - one) / s.micro_batch_size
    return result


def peak_of_steps(arguments: list[str], micro_batch_size: int) -> int | None:
    """Bytes of a step of one such micro-batch, or None where there is no room for it."""
    sizes = [f"--micro_batch_size={micro_batch_size}", f"--batch_size={micro_batch_size}"]
    try:
        contender = Contender(our_step, [*arguments, *sizes])
        contender.forget_peak()
        contender.seconds(False)
        return contender.finish()
    except errors.UserError:
        return None


def computed(s: Settings, here: machine.Machine) -> tuple[int, int]:
    """Bytes that a step takes whatever its micro-batch, without the logits, and bytes for each of its sequences.

    Weights, gradients and optimizer state are 4 bytes an entry. What is kept for the backward pass is linear in the
    number of layers and of sequences, so that models of one and two layers tell it for all.
    """
    (one, two), (one_more, two_more) = (
        [kept_for_backward(dataclasses.replace(s, n_layer=layers, micro_batch_size=size), here) for layers in (1, 2)]
        for size in (1, 2)
    )
    each, each_more = two - one, two_more - one_more  # of a layer
    at_one, at_two = one + (s.n_layer - 1) * each, one_more + (s.n_layer - 1) * each_more
    sequence = at_two - at_one
    weights = make_model(s, machine.Machine(torch.device("meta"), here.dtype, False)).config.parameters
    entries = len(STATE[s.optimizer] - {"step"}) + 2
    return 4 * entries * weights + at_one - sequence, sequence


def kept_for_backward(s: Settings, here: machine.Machine) -> int:
    """Bytes between a forward and a backward pass of one micro-batch, parameters left out."""
    torch.compiler.reset()
    model = make_model(s, here)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, y = next(Batches(random_tokens(s), dataclasses.replace(s, batch_size=s.micro_batch_size), here).train(1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), here.autocast():
        loss = model(x, y)
    loss.backward()
    return sum(kept.values())
