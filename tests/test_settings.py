"""Settings: what config files and the command line may say, what it means, and how train.py refuses the rest.

A malformed case is a pair (config, arguments): the bytes of a config file, or None, and what follows it on the command
line. Each must end with exit code 2, one printable line on stderr and nothing written.
"""

import contextlib
import dataclasses
import io
import os
import shutil
import subprocess
import sys

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import train as script
from run import errors, settings
from run.errors import UserError
from run.files import MAX_BYTES
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
def test_every_config_is_valid_on_1_to_10_devices(path):
    s = read([str(path)])
    if path.stem.startswith("gpt2_"):
        for ranks in (1, 2, 4, 5, 8, 10):
            check_batch(s, ranks)
        assert s.batch_size * s.block_size == 480 * 1024
        assert path.stem.split("_")[-1] in (s.optimizer, "30m", "small", "medium", "540m", "large")


def test_the_configs_have_the_rates_of_the_released_table():
    table = {"small": (6e-4, 1e-4, 6e-4, 0.05), "medium": (3e-4, 1e-4, 7e-4, 0.08), "large": (2e-4, 8e-5, 3e-4, 0.05)}
    for size, (*rates, rho) in table.items():
        adamw, lion, sophiag = (read([f"{ROOT}/config/gpt2_{size}_{x}.py"]) for x in ("adamw", "lion", "sophiag"))
        assert [s.learning_rate for s in (adamw, lion, sophiag)] == rates
        assert sophiag.rho == rho


def test_a_model_size_is_stated_once():
    for path in CONFIGS:
        assert path.stem.count("_") < 2 or "n_layer" not in path.read_text(), path


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


def test_the_schedule_warms_up_and_decays_by_a_cosine():
    s = read(["--learning_rate=1e-3", "--warmup_iters=10", "--max_iters=110"])
    assert learning_rate(s, 1) == pytest.approx(1e-4)
    assert learning_rate(s, 10) == pytest.approx(1e-3)
    assert learning_rate(s, 60) == pytest.approx((1e-3 + 5e-5) / 2)  # halfway
    assert learning_rate(s, 110) == pytest.approx(5e-5)
    assert learning_rate(s, 200) == pytest.approx(5e-5)
    assert learning_rate(dataclasses.replace(s, decay_lr=False), 100) == 1e-3


def test_settings_do_not_import_torch():
    code = "import sys, run.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# What is refused, and in which words


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("--n_layr=3", "unknown setting 'n_layr' in the command line; did you mean 'n_layer'? (--help lists all)"),
        ("-n_layer=3", "unknown setting '-n_layer' in the command line; did you mean 'n_layer'?"),
        ("--n_layer=three", "n_layer = 'three' in the command line: must be a whole number"),
        ("--n_layer=1.5", "n_layer = 1.5 in the command line: must be a whole number"),
        ("--n_layer=True", "n_layer = True in the command line: must be a whole number"),
        ("--n_layer=None", "n_layer = None in the command line: must be a whole number"),
        ("--n_layer", "n_layer in the command line has no value: --n_layer=VALUE"),
        ("--compile=1", "compile = 1 in the command line: must be True or False"),
        ("--rho=x", "rho = 'x' in the command line: must be a number or None"),
        ("--optimizer=sophia", "must be adamw or lion or sophiah or sophiag or muon; did you mean 'sophia"),
        ("--learning_rate=1e999", "learning_rate in the command line: the number must be finite"),
        ("--seed=99999999999999999999", "seed in the command line: the number must be finite and fit into 64 bits"),
        ("--learning_rate=-1", "learning_rate = -1.0: must be at least 0"),
        ("--dropout=1", "dropout = 1.0: must be in [0, 1)"),
        ("--n_embd=100", "n_embd = 100: must be a multiple of n_head = 12, 96 for example"),
        ("--max_iters=0", "max_iters = 0: must be at least 1"),
        ("--timeout=0", "timeout = 0: must be from 1 to 1000000"),
        ("--min_lr=1", "min_lr = 1.0: must be at most learning_rate = 0.0006"),
        ("missing.py", "config file missing.py: No such file"),
    ],
)
def test_a_bad_argument_is_named(argument, complaint):
    with pytest.raises(UserError) as error:
        read([argument])
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("n_layer = 'three'", "line 1: must be a whole number"),
        ("\n\nn_layer = '12'", "n_layer = '12' in c.py, line 3: must be a whole number"),
        ("n_layr = 3", "unknown setting 'n_layr' in c.py, line 1; did you mean 'n_layer'?"),
        ("optimizer = 3", "line 1: must be adamw or lion or sophiah or sophiag or muon; did you mean"),
        ("learning_rate = 1" + "0" * 400, "the number must be finite"),
        ("n_layer = 3\nn_head = __import__('os').cpu_count()", "c.py, line 2: n_head must be a literal"),
        ("n_layer = 2 * 3", "line 1: n_layer must be a literal, a config file is not executed"),
        ("include = base.py", "line 1: include must be a literal"),
        ("import os", "line 1: a config file holds only lines of the form name = LITERAL"),
        ("n_layer: int = 3", "name = LITERAL"),
        ("n_layer = n_head = 3", "name = LITERAL"),
        ("n_layer = (", "was never closed (c.py, line 1)"),
        ("n_layer = 3\ninclude = './c.py'", "c.py, line 2: with ./c.py the file would include itself"),
    ],
)
def test_a_bad_config_file_is_named_with_its_line(tmp_path, monkeypatch, text, complaint):
    (tmp_path / "c.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        read(["c.py"])
    assert complaint in str(error.value)


def fail_with(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")])
def test_out_of_memory_is_one_line(refused, error):
    assert "lower micro_batch_size" in refused(fail_with(error))


def compile_for_nothing():
    """torch.compile where there is no compiler."""
    torch.compiler.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",), "fx_graph_cache": False}):
        torch.compile(torch.sin)(torch.ones(3))


@pytest.mark.parametrize(
    ("main", "line"),
    [
        (
            fail_with(torch.AcceleratorError("CUDA error: an illegal memory access\nand so on")),
            "the device failed (CUDA error: an illegal memory access\\nand so on): CUDA_LAUNCH_BLOCKING=1",
        ),
        (
            fail_with(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling…")),
            "the device failed (CUDA",
        ),
        (fail_with(RuntimeError("Triton Error [CUDA]: an illegal instruction")), "the device failed (Triton Error"),
        (compile_for_nothing, "torch.compile failed (InvalidCxxCompiler: No working C++ compiler found in"),
    ],
    ids=["device", "cuBLAS", "a compiled kernel", "compiler"],
)
def test_an_error_of_the_device_or_the_compiler_is_named_before_its_traceback(capsys, main, line):
    with pytest.raises(SystemExit) as stop:
        errors.run(main)
    assert stop.value.code == 4
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: rank 0: {line}")
    assert ("--compile=False" in first) == (main is compile_for_nothing)
    assert second == "Traceback (most recent call last):"


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
    os.mkfifo(folder / "fifo")
    (folder / "big.py").write_text("n_layer = 1\n" * (MAX_BYTES // 10))
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
    torch.set_flush_denormal(False)  # train.py sets it, and hypothesis draws no numbers then
    return stop.value.code, printed.getvalue()


def assert_refused(folder, config, command):
    before = {*folder.rglob("*"), folder / "config.py"}
    code, line = end(folder, config, command)
    assert code == 2, line
    assert line.startswith("error: ")
    assert line.endswith("\n")
    assert line[:-1].isprintable(), line  # so it is one line, and no terminal obeys it
    assert {*folder.rglob("*"), folder / "config.py"} == before


def test_what_is_in_order_is_not_refused(folder, tmp_path):
    shutil.copytree(folder / "data", tmp_path / "data")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        assert_refused(tmp_path, b"n_head = 4\n", ["--dropout", "0.1"])
    assert (tmp_path / "out" / "metrics.jsonl").exists()


NASTIEST = {
    "a newline in a path": (None, ["no\nsuch.py"]),
    "a terminal's escape in a path": (None, ["no\x1b]0;such\x07.py"]),
    "a null byte in an include": (b"include = 'no\\0such.py'", []),
    "no path at all": (None, [""]),
    "a folder": (None, ["data"]),
    "a pipe": (None, ["fifo"]),
    "an include of a pipe": (b"include = 'fifo'", []),
    "a device": (None, ["/dev/null"]),
    "a file without end": (None, ["/dev/zero"]),
    "a large file": (None, ["big.py"]),
    "includes without end": (None, ["cycle_a.py"]),
    "a null byte": (b"n_layer = 3\n\0", []),
    "not UTF-8": (b"# coding: latin-1\nout_dir = '\xe9'", []),
    "a call": (b"n_layer = __import__('os').system('touch proof')", []),
    "a default that is a call": (b"def n_layer(x=open('proof', 'w')): pass", []),
    "deep brackets": (b"n_layer = " + b"[" * 10**5 + b"]" * 10**5, []),
    "a long number": (b"n_layer = " + b"9" * 5000, []),
    "a long name": (None, ["--" + "n_layer" * 15_000 + "=3"]),
    "a long value": (None, ["--optimizer=" + "\x1b" * 100_000]),
    "a surrogate": (None, ["--device=" + os.fsdecode(b"\xff")]),
    "an out_dir with a null byte": (b"out_dir = 'a\\0b'", []),
    "a data set with too long a name": (None, ["--dataset=" + "x" * 256]),
    "a data set that is a file": (None, ["--dataset=./file"]),
    "weights with too long a name": (None, ["--init_from=" + "x" * 256]),
    "weights that are no weights": (None, ["--init_from=data"]),
}


@pytest.mark.parametrize("case", NASTIEST)
def test_the_nastiest_cases_are_refused_in_one_line(folder, case):
    assert_refused(folder, *NASTIEST[case])


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


# Strategies that draw cases which are malformed whatever is drawn

NAMES = sorted(settings.FIELDS)
CHOICE = "choice"
GROUP = {name: allowed[0] if isinstance(allowed[0], type) else CHOICE for name, allowed in settings.ALLOWED.items()}
INTEGERS = [name for name in NAMES if GROUP[name] is int]
NUMBERS = [name for name in NAMES if GROUP[name] in (int, float)]
WRONG = {  # on the command line and in a config file
    int: ["1.5", "1e5", "True", "'3'", "[3]", "{}", "3j", "b'3'", "..."],
    float: ["True", "'0.1'", "[0.1]", "0.1j", "1e999", "-1e999"],
    bool: ["1", "0", "None", "1.0", "'True'", "[True]", "b''"],
    CHOICE: ["3", "None", "'Auto'", "''", "['auto']"],
}
SYNTAX = ["n_layer = (", "n_layer = 3)", "n_layer = '", "n_layer 3", "n_layer =", " n_layer = 3", "n_layer = 03",
          "n_layer = 3 +", "3 = n_layer", "None = 3", "n-layer = 3", "n_layer := 3", "else: n_layer = 3",
          "n_layer = '\\x'", "]", "\0", "n_layer = 3 \u202e"]  # fmt: skip
PROOF = "open('proof', 'w')"
CODE = ["{}", "n_layer = {}", "n_layer = -{}", "n_layer = [{} for _ in (1,)]", "n_layer = 1 if {} else 2",
        "n_layer += {}", "n_layer: {} = 3", "n_layer[{}] = 3", "n_layer, n_head = {}", "n_layer = (n_head := {})",
        "include = {}", "out_dir = f'{{{}}}'", "import os; {}", "if {}: pass", "with {}: pass", "for _ in (1,): {}",
        "def n_layer(x={}): pass", "@{}\ndef n_layer(): pass", "class n_layer({}): pass", "assert {}"]  # fmt: skip

piece = st.sampled_from(["\n", "\0", "\x1b[31m", "\u202e", "\udcff", "'", "\\", "=", "--", "/", " ", "é", "n_layer"])
messy = st.lists(piece | st.characters(), max_size=6).map("".join)
misspelt = st.builds(
    lambda name, at, x: name[:at] + x + name[at + 1 :], st.sampled_from(NAMES), st.integers(0, 9), piece
)


def on_command_line(name, text):
    return None, [f"--{name}={text}"]


def in_config(line, start='"""What it is."""\nn_layer = 2\n'):
    return (start + line + "\n").encode("utf-8", "surrogatepass"), []


def anywhere(name, text):
    return st.sampled_from([on_command_line(name, text), in_config(f"{name} = {text}")])


unknown = (messy | misspelt).filter(lambda name: name.partition("=")[0] not in NAMES)
wrong_type = st.sampled_from([(name, text) for name in NAMES for text in WRONG.get(GROUP[name], [])])
negative = st.integers(max_value=-1) | st.floats(max_value=-1e-3)
beyond_64_bits = st.integers(2**63, 10**30) | st.integers(-(10**30), -(2**63) - 1)
no_file = st.sampled_from(["", ".", "fifo", "file/c.py", "big.py", "/dev/zero"]) | messy.map("missing/{}".format)
malformed = st.one_of(
    st.builds(on_command_line, unknown, messy),
    unknown.filter(str.isidentifier).map("{} = 3".format).map(in_config),
    wrong_type.flatmap(lambda case: anywhere(*case)),
    st.builds(lambda name: (None, [f"--{name}"]), st.sampled_from(NAMES)),
    st.tuples(st.sampled_from(NUMBERS), negative).flatmap(lambda case: anywhere(*case)),
    st.tuples(st.sampled_from(INTEGERS), beyond_64_bits).flatmap(lambda case: anywhere(*case)),
    st.sampled_from(SYNTAX).map(in_config),
    st.sampled_from(CODE).map(lambda line: in_config(line.format(PROOF))),
    st.binary().map(lambda noise: (b"n_layer = 2\n" + noise + b"\xff\n", [])),
    no_file.map(lambda path: (None, [path])),
    no_file.map(lambda path: in_config(f"include = {path!r}")),
    messy.map(lambda name: on_command_line("dataset", f"missing/{name}")),
    messy.map(lambda name: on_command_line("init_from", f"missing/{name}")),
)


@hypothesis.settings(max_examples=400, derandomize=True, deadline=None)
@hypothesis.given(case=malformed)
def test_whatever_is_malformed_is_refused_in_one_line(folder, case):
    config, command = case
    assert_refused(folder, config, ["--optimizer=sophiag", *command])  # which has a use for every setting
