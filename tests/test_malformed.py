"""Whatever is wrong with a config file or a command line, train.py ends with exit code 2 and one line on stderr.

A case is a pair (config, arguments): the bytes of a config file, or None, and what follows it on the command line. The
strategies below draw cases that are malformed by construction, whatever is drawn.
"""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import train as script
from run import errors, settings
from run.errors import UserError
from run.files import MAX_BYTES
from tests.conftest import TINY, arguments, write_dataset

SECONDS = 20  # which no refusal takes
LONGEST_LINE = 5000
LONG = 100_000  # characters of an argument
ODD_NAME = "odd\n\x1b[31m\u2028\u202e"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that train.py is started in: a data set, and things that are not what they should be."""
    folder = tmp_path_factory.mktemp("malformed")
    write_dataset(folder / "data", list(range(200)) * 5, range(200))
    shutil.copytree(folder / "data", folder / ODD_NAME)
    (folder / ODD_NAME / "val.bin").write_bytes(b"odd")
    (folder / "file").write_text("not a folder")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "fifo")
    (folder / "big.py").write_text("n_layer = 1\n" * (MAX_BYTES // 10))
    for here, there in (("a", "b"), ("b", "a")):
        (folder / f"cycle_{here}.py").write_text(f"include = 'cycle_{there}.py'\n")
    for number in range(settings.MAX_INCLUDES + 1):
        (folder / f"deep_{number}.py").write_text(f"include = 'deep_{number + 1}.py'\n")
        (folder / f"wide_{number}.py").write_text(f"include = 'wide_{number + 1}.py'\n" * 100)
    for end in (f"deep_{settings.MAX_INCLUDES + 1}.py", f"wide_{settings.MAX_INCLUDES}.py"):
        (folder / end).write_text("n_layer = 1\n")
    return folder


def end(folder, config, command):
    """Run train.py; returns its exit code (130 where it hangs) and what it printed to stderr."""
    if config is not None:
        (folder / "config.py").write_bytes(config)
        command = ["config.py", *command]
    good = arguments(**TINY | {"max_iters": 1, "out_dir": "out", "dataset": "./data"})
    printed = io.StringIO()
    code = 0
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "argv", ["train.py", *good, *command])
        patch.chdir(folder)
        said = stack.enter_context(warnings.catch_warnings(record=True, action="always"))
        stack.enter_context(contextlib.redirect_stderr(printed))
        stack.callback(torch.set_flush_denormal, False)  # train.py sets it, and hypothesis draws no numbers then
        stack.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, signal.default_int_handler))
        stack.callback(signal.alarm, 0)
        signal.alarm(SECONDS)
        try:
            errors.run(script.main)
        except SystemExit as stop:
            code = stop.code
    from_parser = [str(warning.message) for warning in said if warning.filename == "<unknown>"]
    return code, "\n".join([*from_parser, printed.getvalue()])


def listing(folder):
    found = [(str(path), path.lstat()) for path in folder.rglob("*") if path.name != "config.py"]
    return sorted((path, status.st_size, status.st_mtime_ns) for path, status in found)


def assert_refused(folder, config, command):
    shutil.rmtree(folder / "out", ignore_errors=True)  # of a case that was not refused
    before = listing(folder)
    code, printed = end(folder, config, command)
    assert code == 2, printed
    assert printed.startswith("error: "), printed
    assert printed.endswith("\n")
    assert printed[:-1].isprintable(), printed  # so it is one line, and no terminal obeys it
    assert len(printed) < LONGEST_LINE
    assert listing(folder) == before


NASTIEST = {
    "a newline in a path": (None, ["no\nsuch.py"]),
    "a terminal's escape in a path": (None, ["no\x1b]0;such\x07.py"]),
    "a newline in an include": (b"include = 'no\\nsuch.py'", []),
    "a null byte in an include": (b"include = 'no\\0such.py'", []),
    "no path at all": (None, [""]),
    "a pipe": (None, ["fifo"]),
    "an include of a pipe": (b"include = 'fifo'", []),
    "a device": (None, ["/dev/null"]),
    "an include of a device": (b"include = '/dev/null'", []),
    "includes without end": (None, ["cycle_a.py"]),
    "more includes than could be read in a lifetime": (None, ["wide_0.py"]),
    "a null byte": (b"n_layer = 3\n\0", []),
    "not UTF-8": (b"# coding: latin-1\nout_dir = '\xe9'", []),
    "what Python warns of in a file": (b"dataset = '\\d'\nn_layer = 1if 1else 2", []),
    "what Python warns of on the command line": (None, ["--n_layer='\\d'"]),
    "a call": (b"n_layer = __import__('os').system('touch proof')", []),
    "a default that is a call": (b"def n_layer(x=open('proof', 'w')): pass", []),
    "division of numbers of a megabit": (b"n_layer = 0x" + b"f" * 600_000 + b" // 0x1" + b"3" * 300_000, []),
    "a power of powers": (b"n_layer = 9 ** 9 ** 9 ** 9", []),
    "a long sum": (b"n_layer = 1" + b"+1" * 400_000, []),
    "deep brackets": (None, ["--n_layer=" + "[" * 10**5 + "]" * 10**5]),
    "a long name": (None, ["--" + "n_layer" * 15_000 + "=3"]),
    "a long value": (None, ["--optimizer=" + "\x1b" * LONG]),
    "a long device": (None, ["--device=" + "cuda" * 25_000]),
    "a surrogate": (None, ["--device=" + os.fsdecode(b"\xff")]),
    "an out_dir with a null byte": (b"out_dir = 'a\\0b'", []),
    "an out_dir with half a character": (b"out_dir = '\\ud800'", []),
    "an out_dir with too long a name": (None, ["--out_dir=" + "x" * 256]),
    "an out_dir with too long a name in a new folder": (None, ["--out_dir=new/" + "x" * 256]),
    "an out_dir below a file": (None, ["--out_dir=file/a\nb"]),
    "an out_dir too deep": (None, ["--out_dir=./" + "a/" * 50_000]),
    "an out_dir that leads nowhere": (None, ["--out_dir=loop"]),
    "a data set with too long a name": (None, ["--dataset=" + "x" * 256]),
    "a data set with an odd name": (None, [f"--dataset=./{ODD_NAME}"]),
    "weights with too long a name": (None, ["--init_from=" + "x" * 256]),
}


@pytest.mark.parametrize("case", NASTIEST)
def test_the_nastiest(folder, case):
    assert_refused(folder, *NASTIEST[case])


def test_a_path_that_is_no_text_in_a_process_of_its_own(tmp_path):
    done = subprocess.run(
        [sys.executable, settings.ROOT / "train.py", b"no\n\x1b[31m\xff.py"], cwd=tmp_path, capture_output=True
    )
    assert done.stderr == b"error: config file no\\n\\x1b[31m\\udcff.py: No such file or directory\n"
    assert done.returncode == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/urandom"])
def test_a_file_without_end_is_not_read(path):
    code = "import resource as r; r.setrlimit(r.RLIMIT_AS, (2**30, 2**30)); from run.settings import read; read"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}([{path!r}])"], cwd=settings.ROOT, capture_output=True, text=True, timeout=60
    )
    assert f"UserError: config file {path}: not a regular file" in done.stderr


# That the tests can fail


@pytest.mark.parametrize("case", [(None, []), (b"include = 'more.py'\nn_layer = n_layer - 1\n", ["--dropout", "0.1"])])
def test_what_is_in_order_is_not_refused(folder, tmp_path, case):
    shutil.copytree(folder / "data", tmp_path / "data")
    (tmp_path / "more.py").write_text("n_head = 2 ** 2\n")
    with pytest.raises(AssertionError):
        assert_refused(tmp_path, *case)
    assert (tmp_path / "out" / "metrics.jsonl").exists()


def two_lines():
    print("first", file=sys.stderr)
    raise UserError("second")


def another_code():
    raise errors.Diverged("nan")


def writes():
    open("proof", "w").close()
    raise UserError("too late")


@pytest.mark.parametrize(
    "main", [two_lines, another_code, writes, lambda: 1 / 0, lambda: sys.exit(2), lambda: time.sleep(9)]
)
def test_what_is_no_refusal_is_noticed(tmp_path, monkeypatch, main):
    monkeypatch.setattr(script, "main", main)
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 1)
    with pytest.raises((AssertionError, ZeroDivisionError)):
        assert_refused(tmp_path, None, [])


# What cases are made of. Where a strategy is asked for, text stands for itself and a list for one of its members.


def drawn(what):
    return what if isinstance(what, st.SearchStrategy) else st.sampled_from([what] if isinstance(what, str) else what)


def on_command_line(argument):
    return drawn(argument).map(lambda argument: (None, [argument]))


def given(name, text):
    return on_command_line(st.builds("--{}={}".format, drawn(name), drawn(text)))


def in_config(line):
    """Config files with this line after some that are in order."""
    start = drawn(["", "# a comment\n", '"""What it is."""\nn_layer = 2\n', "\ufeffn_layer = 2 * n_layer\n"])
    return st.builds(
        lambda start, line: ((start + line + "\n").encode("utf-8", "surrogatepass"), []), start, drawn(line)
    )


def assigned(name, expression):
    return in_config(st.builds("{} = {}".format, drawn(name), drawn(expression)))


def set_anyhow(name, value):
    return given(name, value) | assigned(name, value)


def of_type(*kinds):
    """The settings that may be of one of these types."""
    return [name for name in settings.FIELDS if set(kinds) & set(settings.kinds(name))]


NUMBERS, NOT_TEXT = of_type(int, float), of_type(int, float, bool)
TEXT = [name for name, hint in settings.TYPES.items() if hint is str]
CHOICES = [name for name in of_type(str) if name not in TEXT and name != "wandb_run_name"]
NAMED = [*CHOICES, "device", "init_from", "dataset"]  # what must be the name of something

PIECES = ["\n", "\r", "\0", "\x1b[31m", "\x1b]0;x\x07", "\x85", "\u2028", "\u202e", "\ufeff", "\udcff", "\ud800", "'",
          '"', "\\", "#", "=", "--", "/", "..", "{}", "%s", " ", "é", "🙂", "ｎ", "٣", "None", "n_layer"]  # fmt: skip
piece = drawn(PIECES) | st.characters() | st.binary(min_size=1, max_size=3).map(os.fsdecode)
messy = st.lists(piece, max_size=6).map("".join)
identifier = st.from_regex(r"[a-z_]{1,10}", fullmatch=True)
number = st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6)


# Unknown names, wrong types


def misspelt(name, position, letter, add):
    return name[:position] + letter + name[position if add else position + 1 :]


near_miss = st.builds(misspelt, drawn(list(settings.FIELDS)), st.integers(0, 9), drawn("_xs0"), st.booleans())
unknown = st.one_of(
    given((near_miss | identifier | messy).filter(lambda name: not_a_setting(name.lstrip("-").split("=")[0])), messy),
    assigned((near_miss | identifier).filter(lambda name: name.isidentifier() and not_a_setting(name)), "3"),
)


def not_a_setting(name):
    return name not in settings.FIELDS and name != "include"


WRONG = {
    int: ["1.5", "1e5", "1.0", "True", "'3'", "[3]", "(3,)", "{3}", "{}", "3j", "b'3'", "...", "three"],
    float: ["True", "'0.1'", "[0.1]", "(0.1,)", "{0.1: 1}", "0.1j", "b'0.1'", "...", "nan", "inf"],
    bool: ["1", "0", "1.0", "'True'", "[True]", "true", "yes", "b''", "..."],
    str: ["3", "1.5", "True", "b'x'", "['x']", "{'x': 1}", "1j", "..."],
}


def wrong_values(name):
    kinds = settings.kinds(name)
    return WRONG[kinds[0]] if type(None) in kinds else [*WRONG[kinds[0]], "None"]


wrong_type = st.one_of(
    drawn(list(settings.FIELDS)).flatmap(lambda name: assigned(name, wrong_values(name))),
    drawn(NOT_TEXT).flatmap(lambda name: given(name, wrong_values(name))),
    given(NOT_TEXT, messy.map("x{}".format)),
    given(NOT_TEXT, ["", " ", "=3", "3 4", "3\n4", "03", "1_", "0x", "'", "1if 0", "'\\d'", "[" * 300, "{[]: 1}"]),
    given(TEXT, "None"),
)
wrong_choice = st.one_of(
    given(NAMED, messy.map("x{}".format)),
    assigned(NAMED, messy.map("x{}".format).map(repr)),
    given(CHOICES, ["", "None", "Auto", "ADAMW", " auto", "sophia", "float64"]),
)


# Numbers out of range, or that do not fit each other. The first four numbers of TINY's batch and model are 8, 4, 16, 2.


def out_of_range(name):
    if float in settings.kinds(name):
        low = st.integers(-(2**62), -1) | st.floats(max_value=-1e-300, allow_infinity=False)
        high = drawn(["1e400", "-1e400", "1" + "0" * 400, "0x" + "f" * 99, str(2**63)])
        return low | high | (st.floats(1, 1e300) if name in ("dropout", "beta1", "beta2") else high)
    least = 0 if name in ("eval_sequences", "warmup_iters", "seed") else 1
    return st.integers(max_value=least - 1) | st.integers(min_value=2**63) | drawn(["9" * 5000, "-0x" + "f" * 5000])


def with_sophia(case):  # which has a use for every setting
    return case[0], ["--optimizer=sophiag", "--hessian_estimator=averaged", *case[1]]


bounded = ["n_layer", "batch_size", "micro_batch_size", "block_size", "hessian_batch_size"]
bad_number = st.one_of(
    drawn(NUMBERS).flatmap(lambda name: set_anyhow(name, out_of_range(name))),
    set_anyhow(bounded, st.integers(2**21, 2**63 - 1)),
    set_anyhow("batch_size", st.integers(1, 2**20).filter(lambda size: size % 4)),
    set_anyhow("micro_batch_size", st.integers(9, 2**20) | drawn([3, 5, 6, 7])),
    set_anyhow("n_head", st.integers(17, 2**62) | drawn([3, 5, 6, 7, 9])),
    set_anyhow("n_embd", st.integers(0, 2**61).map(lambda half: 2 * half + 1)),
    set_anyhow("hessian_group_size", st.integers(5, 2**62) | drawn([3])),
    set_anyhow("min_lr", st.floats(1e-3, 1e300)),
).map(with_sophia)


# Texts that are no command lines, or no config files

missing_value = st.one_of(
    on_command_line(drawn(list(settings.FIELDS)).map("--{}".format)),
    drawn(list(settings.FIELDS)).map(lambda name: (None, [f"--{name}", "--n_layer=2"])),
    st.lists(st.text("-=", max_size=5), min_size=1, max_size=3).map(lambda words: (None, words)),
)
garbage = st.one_of(
    st.binary().map(lambda noise: (b"n_layer = 2\n" + noise + b"\xff\n", [])),
    st.builds(lambda start, noise: (start + noise, []), drawn([b"\xff", b"\x80", b"\xc0\xaf", b"\0"]), st.binary()),
    drawn(["utf-16", "utf-16-le", "utf-16-be", "utf-32"]).map(lambda name: ("n_layer = 2\n".encode(name), [])),
    drawn(["latin-1", "utf-8", "utf-7", "nonsense"]).map(
        lambda name: (f"# coding: {name}\nout_dir = '".encode() + b"\xe9'\n", [])
    ),
    in_config(drawn(["\0", "\x1b[0m", "\u202e", "\xa0", "🙂", "٣", "\ufeff", "\ud800"]).map("n_layer = 3 {}".format)),
)
broken_syntax = in_config(
    r"""
n_layer = (
n_layer = 3)
n_layer = '
n_layer = '''
n_layer 3
n_layer = = 3
n_layer =
= 3
 n_layer = 3
n_layer = 3 4
n_layer = 03
n_layer = 1__0
n_layer = 3 +
n_layer = \
3 = n_layer
None = 3
n_layer = $
n-layer = 3
class = 3
n_layer := 3
n_layer = '\x'
n_layer = '\N{nonsense}'
n_layer = b'é'
else: n_layer = 3
if:
@
]""".splitlines()[1:]
)


# Code, which would leave a file behind if it were executed, and other things that are not literals or arithmetic

EXPRESSIONS = """
open('proof', 'w')
__import__('os').system('touch proof')
exec("open('proof', 'w')")
(lambda: open('proof', 'w'))()
[open('proof', 'w') for _ in (1,)]
{open('proof', 'w') for _ in (1,)}
{1: open('proof', 'w')}
sum(open('proof', 'w') for _ in (1,))
f"{open('proof', 'w')}"
(n_head := open('proof', 'w'))
1 if open('proof', 'w') else 2
1 and open('proof', 'w')
1 < open('proof', 'w')
-open('proof', 'w')
not open('proof', 'w')
open('proof', 'w').name
[1, 2][open('proof', 'w')]
[*open('proof', 'w')]
().__class__.__base__.__subclasses__()
int('3')
'3'.join('')
n_head.real
'abc'[0]
(1, 2)
[1, 2]
{1, 2}
{}
~1
1 << 2
1 | 2
1 @ 2
1 == 1
1if 0else 2
lambda: 1
f'{1}'
True + 1
None + 1
-True
-'a'
'a' * 10 ** 10
'a' + 'b'
'%s' % 1
1j * 1j
... + 1
'\\d' + 1""".splitlines()[1:]
STATEMENTS = """
open('proof', 'w')
import os; os.system('touch proof')
from os import *
for _ in (1,): open('proof', 'w')
while open('proof', 'w'): pass
if open('proof', 'w'): pass
with open('proof', 'w'): pass
try: open('proof', 'w')\nfinally: pass
def n_layer(x=open('proof', 'w')): pass
@open('proof', 'w')\ndef n_layer(): pass
class n_layer(open('proof', 'w')): pass
assert open('proof', 'w')
raise open('proof', 'w')
n_layer: open('proof', 'w') = 3
n_layer = n_head = open('proof', 'w')
n_layer += open('proof', 'w')
n_layer, n_head = open('proof', 'w')
*n_layer, = open('proof', 'w')
n_layer.x = open('proof', 'w')
n_layer[open('proof', 'w')] = 3
f"{open('proof', 'w')}"
match open('proof', 'w'):\n    case _: pass
async def n_layer(): pass
global n_layer
del n_layer
n_layer: int
n_layer == 3
n_layer
b'docs'
3
pass
exit()
print('x')
n_layer = 3; import os
n_layer = yield
n_layer = await x
__builtins__ = 3""".splitlines()[1:]
code = st.one_of(
    assigned(NOT_TEXT, EXPRESSIONS),
    given(NOT_TEXT, EXPRESSIONS[:23]),
    assigned(NUMBERS, st.builds("{} * -({})".format, number, drawn(EXPRESSIONS))),
    in_config([statement.replace("\\n", "\n") for statement in STATEMENTS]),
)
arithmetic = assigned(
    NUMBERS,
    st.one_of(
        st.builds("{} {} {}".format, number, drawn(["/", "//", "%"]), drawn(["0", "0.0", "(1 - 1)"])),
        st.builds("0 ** -{}".format, st.integers(1, 10**6)),
        st.builds("({}) ** {}".format, number, st.integers(65, 10**30)),
        st.builds("({0}) ** {1} ** {1}".format, number, st.integers(9, 99)),
        st.builds("{} ** {}".format, st.integers(2**64, 2**99), st.integers(2, 64)),
        st.builds("({}) ** 0.5".format, st.integers(-(10**6), -1)),
        st.builds("{} + undefined_{}".format, number, identifier),
        st.builds("{} * {}".format, messy.map(repr), number),
        drawn(
            ["1e400 - 1e400", "-1e400", "1e200 * 1e200", "1e18 ** 64", "2 ** 63", "10 ** 60 * 1e300", "2 ** 62 ** 64"]
        ),
        st.integers(100_000, 400_000).map(lambda digits: "0x" + "f" * digits + " % 0x1" + "3" * (digits // 2)),
    ),
)
DEEP = [
    lambda n: "-" * n + "1",
    lambda n: "1" + "+1" * n,
    lambda n: "2" + "**2" * n,
    lambda n: "1" + "<1" * n,
    lambda n: "(" * n + "1" + ")" * n,
    lambda n: "-(" * n + "1" + ")" * n,
    lambda n: "[" * n + "]" * n,
    lambda n: "[" + "1," * n + "]",
    lambda n: "{1:" * n,
    lambda n: "x" + ".a" * n,
    lambda n: "x" + "()" * n,
    lambda n: "x" + "[0]" * n,
    lambda n: "not " * n + "1",
    lambda n: "lambda:" * n + "1",
    lambda n: "1 if 1 else " * n + "1",
]
deep = set_anyhow(NUMBERS, st.builds(lambda nest, depth: nest(depth), drawn(DEEP), st.integers(20_000, 30_000)))


# Paths that lead to nothing, to something else, or nowhere

NO_CONFIG = ["", ".", "..", "/", "fifo", "loop", "file", "file/config.py", "big.py", "cycle_a.py", "deep_0.py",
             "wide_0.py", "/dev/null", "/dev/tty", "/proc/self/mem"]  # fmt: skip
no_config = drawn(NO_CONFIG) | messy.map("missing/{}".format) | st.integers(256, LONG).map(lambda length: "x" * length)
include = assigned(
    "include", no_config.map(repr) | drawn(["'config.py'", "3", "None", "b'x'", "f'x'", "'x' + 'y'", "x"])
)
too_deep = st.integers(2100, LONG // 2).map(lambda depth: "./" + "a/" * depth)
folders = st.one_of(
    given("out_dir", messy.map("file/{}".format) | drawn(["", "file", "fifo", "loop/x", "/dev/null/x"])),
    given(
        "out_dir", st.builds("{}{}".format, drawn(["", "new/", "./"]), st.integers(256, LONG).map(lambda n: "x" * n))
    ),
    given(["out_dir", "dataset", "init_from"], too_deep),
    assigned("out_dir", (messy.map("file/{}".format) | st.builds("{}\0{}".format, messy, messy)).map(repr)),
    given(
        "dataset",
        messy.map("missing/{}".format) | drawn(["./" + ODD_NAME, "", "/", "file", "./file", "fifo/x", "loop/"]),
    ),
    given("init_from", messy.map("missing/{}".format) | drawn(["", ".", "data", "resume", "file", "fifo", "loop"])),
)
long = st.one_of(
    given([*NOT_TEXT, *NAMED], piece.map(lambda piece: "x" + piece * LONG)),
    given(piece.map(lambda piece: "x" + piece * LONG), "3"),
    on_command_line(st.builds(lambda start, piece: start + piece * LONG, drawn(["x", "--x"]), piece)),
)

CLASSES = {
    "an unknown name": unknown,
    "a wrong type": wrong_type,
    "a wrong choice": wrong_choice,
    "a bad number": bad_number,
    "a missing value": missing_value,
    "garbage": garbage,
    "broken syntax": broken_syntax,
    "code": code,
    "arithmetic": arithmetic,
    "deep nesting": deep,
    "an include": include,
    "a path": on_command_line(no_config),
    "a folder": folders,
    "a long argument": long,
}


@hypothesis.settings(max_examples=500, derandomize=True, deadline=None)
@hypothesis.given(case=drawn(list(CLASSES)).flatmap(CLASSES.get))
def test_whatever_is_malformed_is_refused_in_one_line(folder, case):
    assert_refused(folder, *case)
