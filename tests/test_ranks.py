"""Several ranks under torchrun: the same run on any number of them, and what becomes of it when one fails."""

import numpy as np
import pytest
import torch

import train as script
from run.machine import Machine
from run.ranks import PIECE, Ranks, pieces
from tests.conftest import OPTIMIZERS, last_checkpoint, same_weights, text_dataset
from tests.stress import two_hosts
from tests.stress.compare_ranks import MICRO_BATCH_SIZES, SETTINGS, difference, rows_of, torchrun
from tests.stress.kill_training import run_with_kills


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    text_dataset(folder / "data")
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    """The rows of every optimizer on 1, 2, 3 and 4 ranks."""
    return {ranks: rows_of(folder, ranks) for ranks in MICRO_BATCH_SIZES}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_number_of_ranks_gives_the_losses_of_one(rows, optimizer, ranks):
    one, several = rows[1][optimizer], rows[ranks][optimizer]
    assert [row["step"] for row in one] == [row["step"] for row in several] == list(range(21))
    for key in ("train/loss", "val/loss", "grad_norm"):
        assert difference(one, several, key) < 1e-5, key
    if optimizer.startswith("sophia"):
        assert difference(one, several, "win_rate") < 0.01
    assert one[1]["train/loss"] - one[20]["train/loss"] > 0.01  # it learnt something to disagree about


def test_an_optimizer_shared_out_over_the_ranks_ends_with_the_same_bytes(folder, rows):
    sharded = rows_of(folder / "sharded", 3, dataset=folder / "data", shard_optimizer=True)
    for name in OPTIMIZERS:
        whole, parts = (last_checkpoint(where / f"{name}-3") for where in (folder, folder / "sharded"))
        assert same_weights(whole, parts)
        if name.startswith("sophia"):
            assert difference(rows[3][name], sharded[name], "win_rate") < 1e-6


def test_a_run_goes_on_with_other_ranks(folder, rows, train, tmp_path):
    """Ten steps on three ranks with the optimizer shared out, the rest on one."""
    settings = SETTINGS | OPTIMIZERS["sophiag"] | {"dataset": folder / "data", "micro_batch_size": 2}
    first = settings | {"out_dir": tmp_path, "max_iters": 10, "lr_decay_iters": 20, "shard_optimizer": True}
    assert torchrun(3, "none", first, capture_output=True).returncode == 0
    rest = train(tmp_path, **settings, init_from="auto")
    assert [row["step"] for row in rest] == list(range(21))
    assert difference(rest, rows[1]["sophiag"], "train/loss") < 1e-5


def test_a_gradient_that_is_not_a_number_on_one_rank_stops_all_and_names_it(folder):
    settings = SETTINGS | {"dataset": folder / "data", "out_dir": folder / "nan", "eval_interval": 2, "log_interval": 4}
    done = torchrun(2, "nan", settings | {"micro_batch_size": 3}, capture_output=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "its gradient's norm nan, because of rank 1 on" in errors[0]
    assert "at step 3: stopped" in errors[0]
    assert "step_00000002" in errors[0]
    assert "exitcode  : 3" in done.stderr
    assert last_checkpoint(folder / "nan").name == "step_00000002"


def test_a_rank_that_hangs_is_named(folder):
    settings = SETTINGS | {"dataset": folder / "data", "out_dir": folder / "hang", "timeout": 5, "eval_interval": 2}
    done = torchrun(2, "hang", settings | {"micro_batch_size": 3}, capture_output=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "of 2 ranks, rank 1 on " in errors[0]
    assert "did not answer" in errors[0]
    assert "exitcode  : 4" in done.stderr
    assert last_checkpoint(folder / "hang").name == "step_00000002"


def test_a_rank_with_other_settings_is_refused(folder):
    settings = SETTINGS | {"dataset": folder / "data", "out_dir": folder / "other", "micro_batch_size": 3}
    done = torchrun(2, "other", settings, capture_output=True)
    assert "error: rank 1: seed = 1, but rank 0 was started with 1337" in done.stderr
    assert not (folder / "other" / "checkpoints").exists()


@pytest.mark.parametrize(("ranks", "kills"), [(1, 3), (3, 2)])
def test_a_killed_run_ends_bit_identical(tmp_path, ranks, kills):
    runs, _ = run_with_kills(tmp_path, kills, ranks)
    assert runs >= 1


@pytest.mark.skipif(not two_hosts.available(), reason="needs root and network namespaces")
def test_two_hosts(tmp_path):
    assert two_hosts.run(tmp_path, timeout=5).resumed_from > 0


def test_tensors_cross_the_network_in_pieces():
    sizes = [3, PIECE - 4, 2, PIECE, 1, 2 * PIECE, 5]
    parts = list(pieces([torch.empty(size, device="meta") for size in sizes]))
    assert [[tensor.numel() for tensor in part] for part in parts] == [
        [3, PIECE - 4], [2], [PIECE], [1], [2 * PIECE], [5],
    ]  # fmt: skip
    assert list(pieces([])) == []


def test_the_rank_at_fault_is_told_from_those_it_reached():
    here = Machine(torch.device("cpu"), torch.float32, compile=False, ranks=Ranks(0, 3, ("a", "b", "c")))
    parts = torch.tensor([[1.0, 2.0, np.nan], [1.0, np.inf, np.nan], [1.0, 3.0, np.nan]])
    assert "because of rank 1 on b alone" in script.culprits(parts, here)
    assert script.culprits(parts.fill_(np.nan), here) == ""
    assert script.culprits(parts.fill_(1.0), here) == ""


def test_a_batch_that_does_not_fit_the_ranks_is_refused_with_what_would(folder):
    settings = SETTINGS | {"dataset": folder / "data", "out_dir": folder / "refused", "micro_batch_size": 4}
    done = torchrun(2, "none", settings, capture_output=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: batch_size = 12 is not a multiple of 8 (micro_batch_size 4 x 2 ranks); 8 or 16 would do;"
        " or micro_batch_size = 2 or 3 or 6"
    ]
    assert not (folder / "refused").exists()
