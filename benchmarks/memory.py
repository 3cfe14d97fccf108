"""What a training step needs of memory, and the largest micro-batch that a GPU has room for."""

import dataclasses
from argparse import Namespace

import torch

from benchmarks.common import make_model, random_tokens
from benchmarks.speed import Contender, NoRoom, our_step
from model import LOGITS
from run import machine
from run.settings import Settings, read
from tokens.batches import Batches
from training.optimizers import STATE

GPUS = (24, 40, 80, 141)  # GB, of 1e9 bytes
RESERVE = 0.1  # of a GPU's memory: CUDA's own, what the allocator cannot use, and curvature's directions
BFLOAT16 = 2  # bytes


def memory_benchmark(options: Namespace, arguments: list[str], here: machine.Machine) -> dict:
    """The largest micro-batch for GPUS, computed from the tensors that the compiled model keeps for its backward pass;
    on CUDA also the largest one that runs. (Computed on a CPU, a context of 256 or less comes out too large.)
    """
    fixed, sequence = computed(read(arguments), here)
    result = {"fixed_bytes": fixed, "bytes_per_sequence": sequence}
    for size in GPUS:
        room = (1 - RESERVE) * size * 1e9 - fixed - 2 * BFLOAT16 * LOGITS
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
    return result


def peak_of_steps(arguments: list[str], micro_batch_size: int) -> int | None:
    """Bytes of a step of one such micro-batch, or None where there is no room for it."""
    sizes = [f"--micro_batch_size={micro_batch_size}", f"--batch_size={micro_batch_size}"]
    try:
        contender = Contender(our_step, [*arguments, *sizes])
        contender.forget_peak()
        contender.seconds(False)
        return contender.finish()
    except NoRoom:
        return None


def computed(s: Settings, here: machine.Machine) -> tuple[int, int]:
    """Bytes that a step takes whatever its micro-batch, without the logits, and bytes for each of its sequences.

    Weights, gradients and optimizer state are 4 bytes an entry. What is kept for the backward pass is linear in the
    number of layers and of sequences, so that models of one and two layers tell it for all; the head's two gradients
    come on top, and with checkpoints the activations of one layer.
    """
    fixed, sequence, layer, layer_sequence = kept_by_part(s, here)
    fixed, sequence = fixed + s.n_layer * layer, sequence + s.n_layer * layer_sequence
    if s.checkpoint_activations:
        *_, layer, layer_sequence = kept_by_part(dataclasses.replace(s, checkpoint_activations=False), here)
        fixed, sequence = fixed + layer, sequence + layer_sequence
    weights = make_model(s, machine.Machine(torch.device("meta"), here.dtype, False)).config.parameters
    entries = (len(STATE[s.optimizer] - {"step"}) + 2) * weights + random_tokens(s).padded_vocab_size * s.n_embd
    return 4 * entries + fixed, 4 * s.block_size * s.n_embd + sequence


def kept_by_part(s: Settings, here: machine.Machine) -> tuple[int, int, int, int]:
    """Bytes kept for the backward pass: in any case, for a sequence, for a layer, for a layer and sequence."""
    bytes_of = {
        (layers, size): kept_for_backward(dataclasses.replace(s, n_layer=layers, micro_batch_size=size), here)
        for layers in (1, 2)
        for size in (1, 2)
    }
    layer_and_sequence = bytes_of[2, 2] - bytes_of[2, 1] - bytes_of[1, 2] + bytes_of[1, 1]
    layer = bytes_of[2, 1] - bytes_of[1, 1] - layer_and_sequence
    sequence = bytes_of[1, 2] - bytes_of[1, 1] - layer_and_sequence
    return bytes_of[1, 1] - sequence - layer - layer_and_sequence, sequence, layer, layer_and_sequence


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
