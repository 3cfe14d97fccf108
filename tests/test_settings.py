import dataclasses
import sys

import pytest

from run import settings
from run.errors import UserError
from run.settings import ROOT, read
from tokens.batches import check_batch
from training.optimizers import learning_rate

CONFIGS = sorted((ROOT / "config").glob("*.py"))


def test_the_defaults_are_the_papers():
    s = read([])
    assert (s.batch_size, s.block_size, s.max_iters, s.warmup_iters, s.grad_clip) == (480, 1024, 100_000, 2000, 1.0)
    assert s.hessian_interval == 10
    assert s.min_lr == pytest.approx(0.05 * s.learning_rate)
    assert read(["--optimizer=sophiah"]).hessian_batch_size == 32
    assert read(["--optimizer=sophiag"]).hessian_batch_size == 240
    assert read(["--optimizer=sophiag", "--hessian_estimator=averaged"]).hessian_batch_size == 32
    small_batch = ["--optimizer=sophiag", "--batch_size=10"]
    assert read(small_batch).hessian_batch_size == 10
    assert read([*small_batch, "--hessian_estimator=averaged"]).hessian_batch_size == 8  # whole groups of 4


def test_each_optimizer_has_its_own_defaults():
    chosen = {name: read([f"--optimizer={name}"]) for name in settings.OPTIMIZER_DEFAULTS}
    assert {name: (s.beta1, s.beta2) for name, s in chosen.items()} == {
        "adamw": (0.9, 0.95), "lion": (0.95, 0.98), "sophiah": (0.96, 0.99), "sophiag": (0.96, 0.99),
    }  # fmt: skip
    assert (chosen["sophiah"].rho, chosen["sophiag"].rho) == (0.01, 0.05)
    assert read(["--optimizer=sophiag", "--beta1=0.5"]).beta1 == 0.5


def test_later_wins(tmp_path):
    config = tmp_path / "c.py"
    config.write_text("n_layer = 3\nn_head = 2\n")
    assert read([str(config), "--n_layer=5"]).n_layer == 5
    assert read(["--n_layer=5", str(config)]).n_layer == 3
    assert read(["--n_layer", "5", "--compile", "False"]).compile is False


def test_a_config_file_holds_literals_arithmetic_and_includes(tmp_path):
    (tmp_path / "base.py").write_text("n_layer = 4\nlearning_rate = 1e-3\n")
    config = tmp_path / "c.py"
    config.write_text(
        '"""What it is."""\ninclude = "base.py"\nn_layer = n_layer * 2 + 1\nmin_lr = learning_rate / 10\n'
        'max_iters = 2 ** 10\nout_dir = "x"\nbias = True\nweight_decay = None\nlr_decay_iters = max_iters // 3\n'
    )
    s = read([str(config)])
    assert (s.n_layer, s.min_lr, s.max_iters, s.out_dir, s.bias) == (9, 1e-4, 1024, "x", True)
    assert s.lr_decay_iters == 341
    assert s.weight_decay == 0.1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_on_1_and_8_devices(path):
    s = read([str(path)])
    if path.stem.startswith("gpt2_"):
        for ranks in (1, 2, 4, 5, 8, 10):
            check_batch(s, ranks)
        assert s.batch_size * s.block_size == 480 * 1024
        optimizer = path.stem.split("_")[-1]
        if optimizer in settings.OPTIMIZER_DEFAULTS:
            assert s.optimizer == optimizer


def test_a_model_size_is_stated_once():
    for path in CONFIGS:
        if len(path.stem.split("_")) == 3:
            text = path.read_text()
            assert "n_layer" not in text, path


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("--n_layr=3", "unknown setting 'n_layr' in the command line; did you mean 'n_layer'?"),
        ("--n_layer=three", "n_layer = 'three' in the command line: must be a whole number"),
        ("--n_layer=1.5", "n_layer = 1.5 in the command line: must be a whole number"),
        ("--n_layer=True", "n_layer = True in the command line: must be a whole number"),
        ("--n_layer", "--n_layer needs a value"),
        ("--compile=1", "compile = 1 in the command line: must be True or False"),
        ("--optimizer=sophia", "did you mean 'sophia"),
        ("--learning_rate=1e999", "must be finite"),
        ("--learning_rate=-1", "learning_rate = -1.0: must be at least 0"),
        ("--dropout=1", "dropout = 1.0: must be in [0, 1)"),
        ("--n_embd=100", "n_embd = 100: must be a multiple of n_head = 12"),
        ("--max_iters=0", "max_iters = 0: must be at least 1"),
        ("--seed=" + "9" * 5000, "seed"),
        ("--learning_rate=1" + "0" * 400, "too large"),
        ("--n_layer={[]:1}", "must be a whole number"),
        ("--backend=foo", "must be one of auto, nccl, gloo"),
        ("missing.py", "config file missing.py: No such file"),
    ],
)
def test_a_bad_argument_is_named(argument, complaint):
    with pytest.raises(UserError) as error:
        read([argument])
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("n_layer = len('abc')", "line 1: only literals and arithmetic are allowed"),
        ("import os", "line 1: a config file holds only lines of the form name = value"),
        ("print('x')", "line 1: a config file holds only lines"),
        ("n_layer = 3\nn_head = __import__('os').cpu_count()", "line 2"),
        ("n_layer = 9 ** 9 ** 9", "the power is too large"),
        ("n_layer = 2 ** 64 ** 2 ** 64", "line 1"),
        ("n_layer = 'a' * 10 ** 10", "arithmetic is for numbers only"),
        ("n_layer = 1 / 0", "division by zero"),
        ("learning_rate = (2 ** 62) ** 64", "too large"),
        ("n_layer = depth", "depth is used but has no value yet"),
        ("n_layer = (", "not assignments in Python's notation"),
        ("n_layer = " + "(" * 500 + "1" + ")" * 500, "line"),
        ("n_layer = " + "-" * 50_000 + "1", "nest"),
        ("n_layer: int = 3", "name = value"),
        ("n_layer = n_head = 3", "name = value"),
        ("include = 'c.py'", "more than 20 files are included"),
        ("include = 3", "include must be the name"),
        ("\0", "not assignments"),
    ],
)
def test_a_bad_config_file_is_refused_and_never_executed(tmp_path, text, complaint):
    config = tmp_path / "c.py"
    config.write_text(text)
    with pytest.raises(UserError) as error:
        read([str(config)])
    if complaint != "nest":  # Python's parser and ours may either of them be the one to stop at deep nesting
        assert complaint in str(error.value)
    assert "c.py" in str(error.value)
    assert "\n" not in str(error.value)


def test_help_shows_name_type_default_and_meaning_of_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        read(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(settings.Settings):
        assert f"--{field.name}={field.default}" in text
    assert "(a whole number)" in text


@pytest.mark.parametrize("ranks", [1, 7])
def test_a_batch_that_does_not_divide_names_values_that_do(ranks):
    s = read(["--batch_size=485", "--micro_batch_size=10"])
    with pytest.raises(UserError) as error:
        check_batch(s, ranks)
    below, above = (485 // (10 * ranks)) * 10 * ranks, (485 // (10 * ranks) + 1) * 10 * ranks
    assert f"{below} or {above} would do" in str(error.value)
    for size in (below, above):
        check_batch(dataclasses.replace(s, batch_size=size), ranks)
    if ranks == 1:
        assert "micro_batch_size = 1 or 5 or 97" in str(error.value)


def test_the_schedule_warms_up_and_decays_by_a_cosine():
    s = read(["--learning_rate=1e-3", "--warmup_iters=10", "--max_iters=110"])
    assert learning_rate(s, 1) == pytest.approx(1e-4)
    assert learning_rate(s, 10) == pytest.approx(1e-3)
    assert learning_rate(s, 60) == pytest.approx((1e-3 + 5e-5) / 2)  # halfway
    assert learning_rate(s, 110) == pytest.approx(5e-5)
    assert learning_rate(s, 200) == pytest.approx(5e-5)
    assert learning_rate(dataclasses.replace(s, decay_lr=False), 100) == 1e-3


def test_settings_do_not_import_torch():
    import subprocess

    code = "import sys, run.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
