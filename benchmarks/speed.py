"""The training step as train.py takes it: its speed, alone and beside other projects', and where its time goes."""

import contextlib
import multiprocessing
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from torch.autograd import DeviceType

from benchmarks import peers
from benchmarks.common import WARM_UP, alternate, make_model, peak_memory, random_tokens, reset_peak_memory, synchronize
from run import errors, machine
from run.settings import read
from tokens.batches import Batches
from training import steps
from training.curvature import Curvature
from training.optimizers import make_optimizer

TOP = 12  # operations that a profile lists

NO_ROOM = "no room"
Step = Callable[[bool], None]  # an update of the weights; with an estimate of curvature if told so


def our_step(arguments: list[str]) -> tuple[Step, machine.Machine]:
    s = read(arguments)
    here = machine.set_up(s)
    model = make_model(s, here)
    optimizer = make_optimizer(model, s, here)
    batches = Batches(random_tokens(s), s, here)
    curvature = Curvature(model, s, here, batches)
    numbers = {True: 1, False: 2}  # of the next updates with and without an estimate

    def step(due: bool) -> None:
        steps.update(numbers[due], model, optimizer, batches, curvature)
        numbers[due] += s.hessian_interval

    return step, here


class NoRoom(errors.UserError):
    pass


class Contender:
    """A step in a process of its own, so that neither the memory nor the set-up of one project is another's."""

    def __init__(self, build: Callable, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        started = time.perf_counter()
        self.process = context.Process(target=serve, args=(theirs, build, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self._answer()
        self.seconds_to_first_step = time.perf_counter() - started

    def seconds(self, due: bool) -> float:
        self.pipe.send(due)
        return self._answer()

    def forget_peak(self) -> None:
        self.pipe.send("forget")

    def finish(self) -> int | None:
        """End the process. Returns the bytes in use when they were the most, None where they are not known."""
        self.pipe.send(None)
        peak = self._answer()
        self.process.join()
        return peak

    def _answer(self):
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise errors.UserError("a step failed, for the reason above") from None
        if answer == NO_ROOM:
            raise NoRoom("there is not enough memory for the step")
        return answer


def serve(pipe: Connection, build: Callable, arguments: tuple) -> None:
    try:
        answer_all(pipe, build, arguments)
    except RuntimeError as error:
        if not errors.is_out_of_memory(error):
            raise
        pipe.send(NO_ROOM)
    except EOFError:
        pass  # the parent ended first


def answer_all(pipe: Connection, build: Callable, arguments: tuple) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        step, here = build(*arguments)

        def seconds(due: bool) -> float:
            start = time.perf_counter()
            step(due)
            synchronize(here)
            return time.perf_counter() - start

        pipe.send(seconds(False))
        while (message := pipe.recv()) is not None:
            if message == "forget":
                reset_peak_memory(here)
            else:
                pipe.send(seconds(message))
        pipe.send(peak_memory(here))


def train_benchmark(options: Namespace, arguments: list[str], here: machine.Machine) -> dict:
    """Seconds and memory of a step of batch_size sequences. Sophia's is the mean over an interval of hessian_interval
    steps, of which one estimates curvature.
    """
    s = read(arguments)
    rate = matmul_rate(here, options.rounds)
    builders = {"ours": (our_step, arguments)}
    for folder in options.peer:
        peers.check(folder)
        if any(name.startswith(f"{folder.resolve().name}_") for name in builders):
            raise errors.UserError(f"--peer {folder}: another peer has that name too")
        formats = {"same": (here.dtype, here.compile)}
        if here.device.type == "cpu":
            formats = {"as_it_runs": (torch.float32, False)} | formats
        for name, (dtype, compile) in formats.items():
            builders[f"{folder.resolve().name}_{name}"] = (peers.step, arguments, folder, dtype, compile)
    contenders = {name: Contender(*builder) for name, builder in builders.items()}
    estimating = {"ours": s.optimizer.startswith("sophia")} | {
        name: peers.is_sophia(builder[2]) for name, builder in builders.items() if name != "ours"
    }
    times: dict[tuple[str, bool], list[float]] = {}
    for number in range(-WARM_UP, options.rounds):
        for name, contender in contenders.items():
            if number == 0:
                contender.forget_peak()
                contender.seconds(False)  # which finds its memory again
            for due in (False, True) if estimating[name] else (False,):
                times.setdefault((name, due), [])
                seconds = contender.seconds(due)
                if number >= 0:
                    times[name, due].append(seconds)
    tokens = s.batch_size * s.block_size
    peak_flops = here.peak_flops()
    flops = tokens * make_model(s, machine.Machine(torch.device("meta"), here.dtype, False)).flops_per_token()
    result = {"tokens_per_step": tokens, "matmul_flops_per_second": rate}
    seconds_of, bytes_of = {}, {}
    for name, contender in contenders.items():
        plain = mean = statistics.median(times[name, False])
        if estimating[name]:
            estimate = statistics.median(times[name, True])
            mean = ((s.hessian_interval - 1) * plain + estimate) / s.hessian_interval
            result |= {f"seconds_plain_{name}": plain, f"seconds_with_estimate_{name}": estimate}
        seconds_of[name], bytes_of[name] = mean, contender.finish()
        result |= {
            f"seconds_{name}": mean,
            f"tokens_per_second_{name}": tokens / mean,
            f"mfu_of_matmul_rate_{name}": flops / mean / rate,
            f"mfu_of_data_sheet_{name}": flops / mean / peak_flops if peak_flops else None,
            f"peak_bytes_{name}": bytes_of[name],
            f"seconds_to_first_step_{name}": contender.seconds_to_first_step,
        }
    for name in contenders:
        if name != "ours":
            result[f"speed_over_{name}"] = seconds_of[name] / seconds_of["ours"]
            if bytes_of[name]:
                result[f"memory_over_{name}"] = bytes_of["ours"] / bytes_of[name]
    if options.peer:
        result["notes"] = peers.NOTES
    return result


def matmul_rate(here: machine.Machine, rounds: int) -> float:
    """FLOP/s of a product of large square matrices in the machine's format."""
    size = 8192 if here.device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=here.device, dtype=here.dtype) for _ in range(2))
    return 2 * size**3 / alternate({"matmul": lambda: left @ right}, here, rounds)["matmul"]


def profile_benchmark(options: Namespace, arguments: list[str], here: machine.Machine) -> dict:
    """Shares of the operations in the time of `--rounds` steps without an estimate, and the share in which none ran:
    no kernel on CUDA, no operator or compiled kernel on a CPU.
    """
    if options.trace:
        try:
            options.trace.touch()
        except OSError as error:
            raise errors.UserError(f"--trace {options.trace} cannot be written: {error.strerror}") from None
    step, here = our_step(arguments)
    for _ in range(WARM_UP):
        step(False)
    synchronize(here)
    with torch.profiler.profile() as profile:
        start = time.perf_counter_ns()
        for _ in range(options.rounds):
            step(False)
        synchronize(here)
        microseconds = (time.perf_counter_ns() - start) / 1000
    if options.trace:
        profile.export_chrome_trace(str(options.trace))
    device = DeviceType.CUDA if here.device.type == "cuda" else DeviceType.CPU
    events = [event for event in profile.events() if event.device_type == device and not event.is_user_annotation]
    if device == DeviceType.CPU:  # the rest are Python's and autograd's own
        events = [event for event in events if event.name.startswith(("aten::", "## Call CompiledFxGraph"))]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, reached = 0.0, -float("inf")
    for begin, end in spans:
        busy += max(end - max(begin, reached), 0)
        reached = max(reached, end)
    shares: dict[str, float] = {}
    for event in events:
        alone = event.device_time_total if device == DeviceType.CUDA else event.self_cpu_time_total
        shares[event.name] = shares.get(event.name, 0) + alone / microseconds
    top = sorted(shares.items(), key=lambda pair: -pair[1])[:TOP]
    return {"seconds_step": microseconds / 1e6 / options.rounds, "idle_share": 1 - busy / microseconds} | {
        f"share {name}": share for name, share in top
    }
