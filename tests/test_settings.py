"""Settings: what config files and the command line may say, what it means, and how train.py refuses the rest."""

import dataclasses
import subprocess
import sys

import pytest
import torch

import train as script
from run import errors, settings
from run.errors import UserError
from run.settings import ROOT, read
from tests.conftest import TINY, arguments, listing
from training.batches import check_batch
from training.optimizers import learning_rate

CONFIGS = sorted((ROOT / "config").glob("*.py"))


# What settings mean


def test_the_defaults_are_the_papers():
    default = read([])
    assert (default.batch_size, default.block_size, default.max_iters, default.warmup_iters) == (480, 1024, 10**5, 2000)
    assert (default.grad_clip, default.hessian_interval) == (1.0, 10)
    assert default.min_lr == pytest.approx(0.05 * default.learning_rate)


def test_each_optimizer_has_its_own_defaults():
    chosen = {name: read([f"--optimizer={name}"]) for name in settings.OPTIMIZER_DEFAULTS}
    assert {name: (s.beta1, s.beta2, s.weight_decay, s.rho, s.hessian_batch_size) for name, s in chosen.items()} == {
        "adamw": (0.9, 0.95, 0.1, None, None), "lion": (0.95, 0.98, 0.5, None, None),
        "sophiah": (0.96, 0.99, 0.2, 0.01, 32), "sophiag": (0.96, 0.99, 0.2, 0.05, 240),
        "muon": (0.95, 0.95, 0.1, None, None),
    }  # fmt: skip
    assert [name for name, s in chosen.items() if s.uses_curvature] == ["sophiah", "sophiag"]
    assert read(["--optimizer=sophiag", "--beta1=0.5"]).beta1 == 0.5


def test_a_curvature_batch_takes_no_more_than_there_is_in_whole_groups():
    sophiag, averaged = "--optimizer=sophiag", "--hessian_estimator=averaged"
    assert read([sophiag, averaged]).hessian_batch_size == 32
    assert read([sophiag, "--batch_size=10"]).hessian_batch_size == 10
    assert read([sophiag, "--batch_size=10", averaged]).hessian_batch_size == 8  # groups of 4


def test_later_wins(tmp_path):
    config = tmp_path / "c.py"
    config.write_text("n_layer = 3\nn_head = 2\n")
    assert read([str(config), "--n_layer=5"]).n_layer == 5
    assert read(["--n_layer=5", str(config)]).n_layer == 3
    assert read(["--n_layer", "5", "--compile", "False", str(config), "--n_head", "4"]).n_head == 4


def test_a_config_file_holds_literals_and_includes_of_files_beside_it(tmp_path):
    (tmp_path / "base.py").write_text("n_layer = 4\nlearning_rate = 1e-3\n")
    (tmp_path / "c.py").write_text(
        '"""What it is."""\ninclude = "base.py"\ninclude = "base.py"\nn_layer = 9\nmax_iters = 1_000  # steps\n'
        'out_dir = "x"\nbias = True\nweight_decay = None\ngrad_clip = 2\noptimizer = "lion"\n'
    )
    s = read([str(tmp_path / "c.py")])
    assert (s.n_layer, s.learning_rate, s.max_iters, s.out_dir, s.bias) == (9, 1e-3, 1000, "x", True)
    assert s.weight_decay == 0.5  # lion's
    assert type(s.grad_clip) is float


def test_none_is_the_default_again_and_other_text_is_kept():
    s = read(["--wandb_run_name=None", "--weight_decay=None", "--dataset=3", "--out_dir=a=b", "--learning_rate=1"])
    assert (s.wandb_run_name, s.weight_decay, s.dataset, s.learning_rate) == ("a=b", 0.1, "3", 1.0)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_on_1_to_8_devices(path):
    s = read([str(path)])
    if path.stem.startswith("gpt2_"):
        for ranks in (1, 2, 4, 8):
            check_batch(s, ranks)
        assert s.batch_size * s.block_size == 480 * 1024
        assert path.stem.split("_")[-1] in (s.optimizer, "30m", "small", "medium", "540m", "large")


def test_the_configs_have_the_rates_of_the_released_table():
    table = {"small": (6e-4, 1e-4, 6e-4, 0.05), "medium": (3e-4, 1e-4, 7e-4, 0.08), "large": (2e-4, 8e-5, 3e-4, 0.05)}
    for size, (*rates, rho) in table.items():
        adamw, lion, sophiag = (read([f"{ROOT}/config/gpt2_{size}_{x}.py"]) for x in ("adamw", "lion", "sophiag"))
        assert [s.learning_rate for s in (adamw, lion, sophiag)] == rates
        assert sophiag.rho == rho


def test_help_shows_name_type_default_and_meaning_of_every_setting(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # so that no line is broken
    for option in ("--help", "-h"):
        with pytest.raises(SystemExit, match="0"):
            read(["--n_layer=3", option])
        printed = capsys.readouterr().out
        for field in dataclasses.fields(settings.Settings):
            assert f"--{field.name} " in printed
            assert f"{field.metadata['help']} ({settings.type_name(field.name)}; default: {field.default})" in printed
    assert "(a number or None; default: None)" in printed
    assert "(paper or averaged; default: paper)" in printed


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


def test_a_learning_rate_that_does_not_decay_stays():  # the cosine: test_replay.py
    s = read(["--learning_rate=1e-3", "--warmup_iters=10", "--decay_lr=False"])
    assert [learning_rate(s, step) for step in (1, 10, 10**5)] == pytest.approx([1e-4, 1e-3, 1e-3])


def test_settings_do_not_import_torch():
    code = "import sys, run.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# What is refused, and in which words


def fail_with(error):
    def fail():
        raise error

    return fail


def compile_for_nothing():
    """torch.compile where there is no compiler."""
    torch.compiler.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",), "fx_graph_cache": False}):
        torch.compile(torch.sin)(torch.ones(3))


FAILED = "the device failed ("
FAULTS = {  # of the machine: the first line says what failed
    "memory": (fail_with(MemoryError()), 2, "ran out of memory (): lower micro_batch_size"),
    "the device's memory": (fail_with(RuntimeError("CUDA out of memory.\n2 GiB")), 2, "lower micro_batch_size"),
    "device": (
        fail_with(torch.AcceleratorError("CUDA error: an illegal access\nand so on")),
        4,
        f"{FAILED}CUDA error: an illegal access\\nand so on): CUDA_LAUNCH_BLOCKING=1",
    ),
    "cuBLAS": (fail_with(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED")), 4, f"{FAILED}CUDA error"),
    "kernel": (fail_with(RuntimeError("Triton Error [CUDA]: an instruction")), 4, f"{FAILED}Triton Error"),
    "compiler": (compile_for_nothing, 4, "torch.compile failed (InvalidCxxCompiler: No working C++ compiler found in"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_machine_is_named_in_one_line_before_any_traceback(capsys, fault):
    main, code, line = FAULTS[fault]
    with pytest.raises(SystemExit) as stop:
        errors.run(main)
    assert stop.value.code == code
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("error: rank 0") and line in first
    assert ("--compile=False" in first) == (fault == "compiler")
    assert rest[:1] == ["Traceback (most recent call last):"] * (code == 4)


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="^a shape is wrong$"):
        errors.run(fail_with(RuntimeError("a shape is wrong")))


# What is malformed, from end to end


@pytest.fixture
def refused_line(refused, call, dataset, tmp_path, monkeypatch):
    """refused_line(config, argument) is what train.py says of a config file or an argument; it writes nothing."""
    monkeypatch.chdir(tmp_path)
    good = arguments(**TINY | {"out_dir": "out", "dataset": dataset, "optimizer": "sophiag"})  # uses every setting
    (tmp_path / "other.py").write_text("include = 'config.py'\n")

    def run(config, argument):
        (tmp_path / "config.py").write_text(config or "", encoding="latin-1")
        before = listing(tmp_path)
        line = refused(lambda: call(script, *good, "config.py", *([argument] if argument else [])))
        assert listing(tmp_path) == before
        return line

    return run


REFUSED = [  # what is said, a config file, an argument
    ("unknown setting 'n_layr' in the command line; did you mean 'n_layer'? (--help lists all)", None, "--n_layr=3"),
    ("unknown setting 'n_layr' in config.py, line 2; did you mean 'n_layer'?", "\nn_layr = 3", None),
    ("n_layer = '12' in config.py, line 3: must be a whole number", "\n\nn_layer = '12'", None),
    ("n_layer in the command line has no value: --n_layer=VALUE", None, "--n_layer"),
    ("compile = 'yes' in the command line: must be True or False", None, "--compile=yes"),
    ("rho = '5%' in the command line: must be a number or None", None, "--rho=5%"),
    ("must be adamw or lion or sophiah or sophiag or muon; did you mean 'sophia", None, "--optimizer=sophia"),
    ("seed in the command line: the number must be finite and fit into 64 bits", None, f"--seed={10**20}"),
    ("dropout = 1.0: must be in [0, 1)", None, "--dropout=1"),
    ("n_embd = 15: must be a multiple of n_head = 2, 16 for example", None, "--n_embd=15"),
    ("max_iters = 0: must be at least 1", None, "--max_iters=0"),
    ("min_lr = 1.0: must be at most learning_rate = 0.0006", None, "--min_lr=1"),
    ("config.py, line 2: n_head must be a literal", "n_layer = 3\nn_head = open('proof', 'w')", None),
    ("line 1: a config file holds only lines of the form name = LITERAL", "import os", None),
    ("was never closed (config.py, line 1)", "n_layer = (", None),
    ("config.py: 'utf-8' codec can't decode", "# für kleine Karten", None),
    ("other.py, line 1: with config.py the file would include itself", "include = 'other.py'", None),
    ("config file missing.py: No such file", None, "missing.py"),
]


@pytest.mark.parametrize(("complaint", "config", "argument"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_malformed_is_named_in_one_line(refused_line, complaint, config, argument):
    assert complaint in refused_line(config, argument)


WRONG = {  # by the type that --help tells
    "a whole number": ["1.5", "True", "'3'", "-1"],
    "a number": ["True", "'0.1'", "1e999", "-0.1"],
    "True or False": ["1", "None", "'True'"],
}


def test_every_setting_refuses_what_is_not_of_its_type_or_range(refused_line):
    for name in settings.FIELDS:
        for value in WRONG.get(settings.type_name(name).removesuffix(" or None"), []):
            assert name in refused_line(None, f"--{name}={value}")
            assert name in refused_line(f"{name} = {value}", None)


def test_an_out_dir_that_cannot_be_made_is_refused(train, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/out"):
        train(tmp_path / "file/out")
