"""Several ranks under torchrun: the same run on any number of them, and what becomes of it when one fails."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import train as script
from data.token_files import open_data
from model import GPT, GPTConfig
from run import errors
from run.machine import Machine
from run.ranks import Ranks
from run.settings import read
from tests.conftest import OPTIMIZERS, arguments, last_checkpoint, rows_of, same_weights, text_dataset, without_timings
from tests.stress.compare_ranks import BOUNDS, difference, settings_of, torchrun
from training.start import check_same_job, form_buckets, wrap

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


@pytest.mark.parametrize(
    ("fault", "said", "exit_code"),
    [
        ("nan", r"its gradient's norm nan at step 3: stopped.*step_00000002", 3),
        ("hang", "an exchange with the other ranks failed", 4),
    ],
)
def test_a_fault_of_one_rank_ends_the_job_in_time_with_one_line(folder, fault, said, exit_code):
    run = settings_of(folder, "adamw", 2) | {"out_dir": folder / fault, "eval_interval": 2, "log_interval": 4}
    done = torchrun(2, run | {"timeout": 4 if fault == "hang" else 60}, fault=fault)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(said, error)
    assert f"exitcode  : {exit_code}" in done.stderr
    assert last_checkpoint(folder / fault).name == "step_00000002"


class ToldByRank0(Ranks):
    """Rank 1, which hears of rank 0 that it has another seed."""

    def broadcast_object(self, value):
        return value | {"seed": 1337}


def test_a_rank_with_other_settings_is_refused(folder):
    s = script.read(arguments(**settings_of(folder, "adamw", 2), seed=1))
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
        graphs = []
        model.h.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)  # noqa: B023
        called(idx, idx)
        counts.append(len(graphs))
    assert counts[0] == 1
    assert counts[1] >= 3  # buckets of 25 MiB


def test_a_large_block_is_cut_once(own_group):
    """Kernels cannot reach over a cut, and within a block every one of them would."""
    machine = Machine(torch.device("cpu"), torch.float32, compile=True, ranks=Ranks(0, 2))
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=3, n_head=8, n_embd=1024))  # of 48 MiB
    graphs = []
    torch.compiler.reset()
    model.h.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    idx = torch.zeros(1, 8, dtype=torch.int64)
    wrap(model, machine)(idx, idx)
    assert len(graphs) == model.config.n_layer + 1


def test_gradients_of_several_ranks_live_in_the_buckets_they_are_exchanged_in(own_group):
    """Beside them they would take as much memory again."""
    machine = Machine(torch.device("cpu"), torch.float32, compile=False, ranks=Ranks(0, 2))
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=2, n_head=2, n_embd=32))
    parallel = wrap(model, machine)
    settings = read(["--batch_size=8", "--micro_batch_size=2", "--block_size=8"])
    idx = torch.zeros(2, 8, dtype=torch.int64)
    batches = SimpleNamespace(
        settings=settings, machine=machine, accumulation_steps=2, train=lambda _: [(idx, idx), (idx, idx)]
    )
    optimizer, curvature = torch.optim.AdamW(model.parameters()), SimpleNamespace(is_due=lambda _: False)
    form_buckets(parallel, machine, idx.shape)
    places = []
    for step in (1, 2):
        script.update(step, parallel, optimizer, batches, curvature)
        places.append({param.grad.untyped_storage().data_ptr() for param in model.parameters()})
    assert len(places[0]) <= 2 < len(list(model.parameters()))
    assert places[0] == places[1]
