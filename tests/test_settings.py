"""Settings: what config files and the command line may say, what it means, and how train.py refuses the rest.

A malformed case is a pair (config, arguments): the bytes of a config file, or None, and what follows it on the command
line. Each must end with exit code 2, one printable line on stderr and nothing written.
"""

import contextlib
import dataclasses
import io
import random
import shutil
import subprocess
import sys

import pytest
import torch

import train as script
from run import errors, settings
from run.errors import UserError
from run.settings import ROOT, read
from tests.conftest import TINY, arguments, write_dataset
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


# Malformed cases, from end to end


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that train.py is started in: a data set, and things that are not what they should be."""
    folder = tmp_path_factory.mktemp("malformed")
    write_dataset(folder / "data", list(range(200)) * 5, range(200))
    (folder / "file").write_text("not a folder")
    (folder / "cycle_a.py").write_text("include = 'cycle_b.py'\n")
    (folder / "cycle_b.py").write_text("include = 'cycle_a.py'\n")
    return folder


def end(folder, config, command):
    """Run train.py; returns its exit code and what it printed to stderr."""
    if config is not None:
        (folder / "config.py").write_bytes(config)
        command = ["config.py", *command]
    good = arguments(**TINY | {"max_iters": 1, "out_dir": "out", "dataset": "./data"})
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as printed:
        patch.setattr(sys, "argv", ["train.py", *good, *command])
        patch.chdir(folder)
        with pytest.raises(SystemExit) as stop:
            errors.run(script.main)
    return stop.value.code, printed.getvalue()


def assert_refused(folder, config, argument):
    before = {*folder.rglob("*"), folder / "config.py"}
    command = ["--optimizer=sophiag"] if argument is None else ["--optimizer=sophiag", argument]  # uses every setting
    code, line = end(folder, config, command)
    assert code == 2, (config, argument, line)
    assert line.startswith("error: ")
    assert line.endswith("\n")
    assert line[:-1].isprintable(), line  # so it is one line, and no terminal obeys it
    assert {*folder.rglob("*"), folder / "config.py"} == before
    return line


def test_what_is_in_order_is_not_refused(folder, tmp_path):
    shutil.copytree(folder / "data", tmp_path / "data")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        assert_refused(tmp_path, b"n_head = 4\n", "--dropout=0.1")
    assert (tmp_path / "out" / "metrics.jsonl").exists()


REFUSED = [  # what is said, a config file, arguments
    ("unknown setting 'n_layr' in the command line; did you mean 'n_layer'? (--help lists all)", None, "--n_layr=3"),
    ("unknown setting 'n_layr' in config.py, line 2; did you mean 'n_layer'?", "\nn_layr = 3", None),
    ("n_layer = '12' in config.py, line 3: must be a whole number", "\n\nn_layer = '12'", None),
    ("n_layer in the command line has no value: --n_layer=VALUE", None, "--n_layer"),
    ("compile = 1 in the command line: must be True or False", None, "--compile=1"),
    ("rho = 'x' in the command line: must be a number or None", None, "--rho=x"),
    ("must be adamw or lion or sophiah or sophiag or muon; did you mean 'sophia", None, "--optimizer=sophia"),
    ("learning_rate in the command line: the number must be finite", None, "--learning_rate=1e999"),
    ("the number must be finite", "learning_rate = 1" + "0" * 400, None),
    ("seed in the command line: the number must be finite and fit into 64 bits", None, f"--seed={10**20}"),
    ("learning_rate = -1.0: must be at least 0", None, "--learning_rate=-1"),
    ("dropout = 1.0: must be in [0, 1)", None, "--dropout=1"),
    ("n_embd = 15: must be a multiple of n_head = 2, 16 for example", None, "--n_embd=15"),
    ("max_iters = 0: must be at least 1", None, "--max_iters=0"),
    ("min_lr = 1.0: must be at most learning_rate = 0.0006", None, "--min_lr=1"),
    ("config.py, line 2: n_head must be a literal", "n_layer = 3\nn_head = open('proof', 'w')", None),
    ("line 1: n_layer must be a literal, a config file is not executed", "n_layer = 2 * 3", None),
    ("line 1: a config file holds only lines of the form name = LITERAL", "import os", None),
    ("was never closed (config.py, line 1)", "n_layer = (", None),
    ("config.py, line 2: with ./config.py the file would include itself", "n_layer = 3\ninclude = './config.py'", None),
    ("would include itself", None, "cycle_a.py"),
    ("config file missing.py: No such file", None, "missing.py"),
    ("config file no\\nsuch\\x1b.py", None, "no\nsuch\x1b.py"),
    ("", "include = 'no\\0such.py'", None),
    ("", None, ""),
    ("", "n_layer = 3\n\0", None),
    ("", "n_layer = " + "[" * 10**5 + "]" * 10**5, None),
    ("", "n_layer = " + "9" * 5000, None),
    ("", None, "--" + "n_layer" * 15_000 + "=3"),
    ("", None, "--optimizer=" + "\x1b" * 100_000),
    ("", None, "--device=\udcff"),
    ("", "out_dir = 'a\\0b'", None),
    ("", None, "--dataset=" + "x" * 256),
    ("", None, "--init_from=" + "x" * 256),
    ("", None, "--init_from=data"),
]


@pytest.mark.parametrize(("complaint", "config", "argument"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_malformed_is_named_in_one_line(folder, complaint, config, argument):
    assert complaint in assert_refused(folder, config and config.encode(), argument)


@pytest.mark.parametrize("out_dir", ["x" * 256, "file/a\nb"])
def test_an_out_dir_that_cannot_be_made_is_refused_in_the_last_line(folder, out_dir):
    code, printed = end(folder, None, [f"--out_dir={out_dir}"])
    assert code == 2, printed
    last = printed.splitlines()[-1]
    assert last.startswith("error: ")
    assert errors.one_line(out_dir) in last


def test_a_path_that_is_no_text_is_refused_in_a_process_of_its_own(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", b"no\n\xff.py"], cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stderr) == (2, b"error: config file no\\n\\udcff.py: No such file or directory\n")
    assert not list(tmp_path.iterdir())


WRONG = {  # by the type that --help tells
    "a whole number": ["1.5", "1e5", "True", "'3'", "[3]", "{}", "...", "-1", str(2**63)],
    "a number": ["True", "'0.1'", "[0.1]", "0.1j", "1e999", "-1e999", "-0.1"],
    "True or False": ["1", "0", "None", "1.0", "'True'", "[True]", "b''"],
}
PROOF = "open('proof', 'w')"
CODE = ["{}", "n_layer = {}", "n_layer = -{}", "n_layer = [{} for _ in (1,)]", "n_layer += {}", "n_layer: {} = 3",
        "n_layer[{}] = 3", "include = {}", "out_dir = f'{{{}}}'", "import os; {}", "if {}: pass",
        "def n_layer(x={}): pass", "@{}\ndef n_layer(): pass", "class n_layer({}): pass", "assert {}"]  # fmt: skip
MESSES = ["\n", "\0", "\x1b[31m", "\u202e", "\udcff", "'", "\\", "=", "--", "/", " ", "é"]


def malformed():
    """What is wrong with each setting, on the command line and in a config file; names and paths; code; noise."""
    for field in dataclasses.fields(settings.Settings):
        yield None, f"--{field.name}"
        for value in WRONG.get(settings.type_name(field.name).removesuffix(" or None"), []):
            yield None, f"--{field.name}={value}"
            yield f"{field.name} = {value}".encode(), None
    for mess in MESSES:
        for argument in (f"--n_{mess}layer={mess}", f"no/{mess}", f"--dataset=no/{mess}", f"--init_from=no/{mess}"):
            yield None, argument
        yield f"include = {f'no/{mess}'!r}".encode(), None
    for line in CODE:
        yield line.format(PROOF).encode(), None
    chance = random.Random(0)
    for _ in range(50):
        yield b"n_layer = 2\n" + chance.randbytes(30) + b"\xff\n", None


def test_whatever_is_malformed_is_refused_in_one_line(folder):
    for config, argument in malformed():
        assert_refused(folder, config, argument)
