"""Several ranks under torchrun: the same run on any number of them, and what becomes of it when one fails."""

import shutil
import threading

import pytest
import torch
import torch.distributed as dist

import train as script
from data.token_files import open_data
from model import GPT, GPTConfig
from run import errors
from run.machine import Machine
from run.ranks import Ranks, meet
from tests.conftest import OPTIMIZERS, last_checkpoint, rows_of, same_weights, text_dataset, without_timings
from tests.stress.compare_ranks import BOUNDS, difference, settings_of, torchrun
from training.start import check_same_job, wrap

LONG = {"max_iters": 40, "eval_interval": 20, "dropout": 0.1, "hessian_interval": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    text_dataset(folder / "data")
    return folder


@pytest.fixture(scope="module")
def three_ranks(folder):
    """The runs of this file on three ranks, in `folder`, by two calls of torchrun as starting takes longest."""
    plain = {name: settings_of(folder, name, 3) for name in OPTIMIZERS}
    begun = plain["sophiag"] | {"out_dir": folder / "begun", "max_iters": 10, "lr_decay_iters": 20}
    whole = {name: plain[name] | LONG | {"out_dir": folder / f"{name}-whole"} for name in OPTIMIZERS}
    done = torchrun(3, *plain.values(), begun, *whole.values())
    assert done.returncode == 0, done.stderr
    for name in OPTIMIZERS:
        shutil.copytree(folder / f"{name}-whole", folder / f"{name}-parts")
        shutil.rmtree(last_checkpoint(folder / f"{name}-parts"))  # back to step 20
    resumed = {"init_from": "resume"}
    done = torchrun(3, *(whole[name] | resumed | {"out_dir": folder / f"{name}-parts"} for name in OPTIMIZERS))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("steps 20 to 40") == len(OPTIMIZERS)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_three_ranks_give_the_losses_of_one(folder, three_ranks, train, optimizer):
    settings = settings_of(folder, optimizer, 1)
    one, three = train(**settings), rows_of(folder / f"{optimizer}-3")
    for key in ("train/loss", "val/loss", "grad_norm"):
        assert difference(one, three, key) < BOUNDS[optimizer], key
    if optimizer.startswith("sophia"):
        assert difference(one, three, "win_rate") < 0.01 < one[1]["win_rate"]
    assert one[1]["train/loss"] - one[20]["train/loss"] > 0.01  # it learnt something to disagree about


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_on_three_ranks_ends_bit_identical(folder, three_ranks, optimizer):
    whole, parts = folder / f"{optimizer}-whole", folder / f"{optimizer}-parts"
    assert last_checkpoint(whole).name == "step_00000040"
    assert same_weights(last_checkpoint(whole), last_checkpoint(parts))
    assert without_timings(rows_of(whole)) == without_timings(rows_of(parts))
    assert [row["step"] for row in rows_of(parts)] == list(range(41))


def test_a_run_goes_on_with_other_ranks(folder, three_ranks, train, tmp_path):
    """Ten steps on three ranks, the rest on one."""
    settings = settings_of(folder, "sophiag", 1)
    rest = train(**settings | {"out_dir": folder / "begun", "init_from": "resume"})
    assert difference(rest, train(**settings | {"out_dir": tmp_path}), "train/loss") < BOUNDS["sophiag"]


def test_a_signal_to_one_rank_stops_all_after_its_step(folder):
    run = settings_of(folder, "adamw", 2) | {"out_dir": folder / "signal", "log_interval": 5}
    done = torchrun(2, run, fault="signal")
    assert "a signal to another rank: stopped after step 3, whose checkpoint is written" in done.stderr
    assert "exitcode  : 75" in done.stderr
    assert last_checkpoint(folder / "signal").name == "step_00000003"


# Faults


def error_of(done):
    """The one line that a job says why it ended with."""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_a_gradient_that_is_not_a_number_on_one_rank_stops_all(folder):
    run = settings_of(folder, "adamw", 2) | {"out_dir": folder / "nan", "eval_interval": 2, "log_interval": 4}
    done = torchrun(2, run, fault="nan")
    assert "its gradient's norm nan at step 3" in error_of(done)
    assert "at step 3: stopped" in error_of(done)
    assert "step_00000002" in error_of(done)
    assert "exitcode  : 3" in done.stderr
    assert last_checkpoint(folder / "nan").name == "step_00000002"


def test_a_rank_that_hangs_ends_the_job_in_time(folder):
    run = settings_of(folder, "adamw", 2) | {"out_dir": folder / "hang", "eval_interval": 2, "timeout": 4}
    done = torchrun(2, run, fault="hang")
    assert "an exchange with the other ranks failed" in error_of(done)
    assert "exitcode  : 4" in done.stderr
    assert last_checkpoint(folder / "hang").name == "step_00000002"


def test_ranks_meet_anew_in_a_store_that_has_the_names_of_dead_ones():
    store, met = dist.HashStore(), []

    def arrive(rank):
        part = meet(store, rank, 3, 20)
        part.set(f"from {rank}", "here")
        met.append(part)

    for _ in range(2):  # the second time as torchrun restarts its workers
        del met[:]
        threads = [threading.Thread(target=arrive, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(met) == 3
        assert all(part.check([f"from {rank}" for rank in range(3)]) for part in met)


def test_who_does_not_come_to_the_meeting_is_named():
    with pytest.raises(RuntimeError, match="^of 3 ranks, rank 1, 2 did not arrive$"):
        meet(dist.HashStore(), 0, 3, 0.2)


class ToldByRank0(Ranks):
    """Rank 1, which hears of rank 0 that it has another seed."""

    def broadcast_object(self, value):
        return value | {"seed": 1337}


def test_a_rank_with_other_settings_is_refused(folder):
    s = script.read([f"--{name}={value}" for name, value in settings_of(folder, "adamw", 2).items()] + ["--seed=1"])
    machine = Machine(torch.device("cpu"), torch.float32, False, ToldByRank0(1, 2))
    with pytest.raises(errors.RankError, match="^seed = 1, but rank 0 was started with 1337$"):
        check_same_job(s, open_data(s.dataset, s.block_size), machine)


def test_an_error_of_one_rank_is_said_by_that_rank(capsys, monkeypatch):
    def said(kind, rank, local_rank):
        def fail():
            raise kind("out of range")

        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit) as stop:
            errors.run(fail)
        assert stop.value.code == kind.exit_code
        return capsys.readouterr().err

    assert said(errors.UserError, "3", "3") == ""  # the first rank of the machine says it
    assert said(errors.UserError, "3", "0") == "error: rank 3: out of range\n"
    assert said(errors.RankError, "3", "3") == "error: rank 3: out of range\n"


class Graphs:
    """A backend of torch.compile that counts the graphs it is given."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, _):
        self.count += 1
        return graph.forward


@pytest.fixture
def own_group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_compiled_blocks_are_split_where_ddp_exchanges_gradients(own_group):
    """A backward pass that is one graph would not let a bucket go before all gradients are there."""
    machine = Machine(torch.device("cpu"), torch.float32, compile=True, ranks=Ranks(0, 2))
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=6, n_head=8, n_embd=512))  # blocks of 72 MiB
    idx = torch.zeros(1, 8, dtype=torch.int64)
    counts = []
    for called in (model, wrap(model, machine)):
        torch.compiler.reset()
        graphs = Graphs()
        model.h.compile(backend=graphs)
        called(idx, idx)
        counts.append(graphs.count)
    assert counts[0] == 1
    assert counts[1] >= 3  # buckets of 25 MiB
