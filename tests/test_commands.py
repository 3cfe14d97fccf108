"""Every command of the documentation runs as it stands, block by block, in a copy of the repository.

A line that says `# needs a network` or `# needs a GPU` is left out. Models, runs and data are tiny. torchrun's options
are checked, and one process runs. `make` only says what it would do.
"""

import re
import shutil
import subprocess

import pytest

from model import GPTConfig
from run.settings import ROOT
from tests.command_shell import shell
from tests.conftest import TINY, arguments, random_model, write_dataset
from tests.test_benchmarks import PEER, SMALL
from tests.test_evaluate import write_superglue
from tests.test_preparation import write_documents
from tests.test_pretrained import nanogpt_checkpoint
from tests.test_readme import PAGES

# What a command gets besides its own arguments, so that it takes a second in place of hours. Later wins.
LESS = {
    "train.py": arguments(**TINY | {"max_iters": 4, "warmup_iters": 1, "eval_interval": 2}),
    "sample.py": ["--max_new_tokens=5"],
    "plot.py": ["--max-loss=99"],  # as tiny runs learn little
    "tools.benchmark": [*SMALL, *arguments(rounds=1, micro_batch_size=4, batch_size=4, hessian_batch_size=4)],
    "studies": ["--plan"],  # what is left out is the runs
}
# What a block goes on from, and does not make itself: paths in the folder that `made` fills
PRESUPPOSED = {
    "data.md:2": "mine",
    "data.md:3": "data/mine",
    "results.md:1": "data/stdlib",
    "results.md:3": "data/stdlib",
    "results.md:4": "DIR_OF_NANOGPT",
    "weights.md:1": "out/gpt2_small_sophiag",
    "weights.md:2": "my_gpt2 nanoGPT",
    "weights.md:3": "out/gpt2_small_sophiag",
    "weights.md:4": "out/gpt2_small_sophiag superglue",
    "weights.md:5": "out",
}
TRAINING = """
for run in adamw_1 adamw_2 sophiag_1 sophiag_2; do
  python train.py config/gpt2_small_${run%_*}.py --seed=${run#*_} --out_dir=../made/out/$run
done
python -m tools.export --out_dir=../made/out/adamw_1 --to=../made/my_gpt2
"""
PROGRAMS = {
    "make": f'#!/bin/bash\ngrep "^make $1" .ci/run && exec {shutil.which("make")} -n "$@"\n',  # which .ci/run makes
    "srun": '#!/bin/bash\nSLURM_NODEID=0 exec "$@"\n',
    "scontrol": "#!/bin/bash\necho node1\necho node2\n",
}
MARKED = re.compile(r"^(?:.*\\\n)*.*#.*\bneeds a (?:network|GPU)\b.*\n", re.MULTILINE)  # with the lines it continues
SHELL_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = {
    f"{page.name}:{number}": MARKED.sub("", block)
    for page in PAGES
    for number, block in enumerate(SHELL_BLOCK.findall(page.read_text()), start=1)
}


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """bash(script, folder) gives a script's exit code, and what it and its commands print."""
    folder = tmp_path_factory.mktemp("bash")
    settings = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with shell(folder, LESS, PROGRAMS, ["bash", "grep", "head"], settings) as run:
        yield run


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the repository, with a tiny data set in place of OpenWebText."""
    left_out = ".git .venv .*_cache __pycache__ out* wandb *.bin *.tmp meta.json".split()
    folder = tmp_path_factory.mktemp("work") / "repository"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out))
    tokens = list(b"So it goes, and so it goes on. " * 100)
    write_dataset(folder / "data" / "openwebtext", tokens, tokens)
    return folder


@pytest.fixture(scope="module")
def made(bash, repository):
    """A folder with what the blocks go on from."""
    folder = repository.parent / "made"
    for name in ("mine", "data", "nanoGPT/out", "DIR_OF_NANOGPT"):
        (folder / name).mkdir(parents=True)
    code, output = bash(TRAINING, repository)
    assert code == 0, output
    for name in ("adamw", "sophiag", "gpt2_small_adamw", "gpt2_small_sophiag"):
        shutil.copytree(folder / f"out/{name.split('_')[-1]}_1", folder / "out" / name)
    for name in ("mine", "stdlib"):
        shutil.copytree(repository / "data/openwebtext", folder / "data" / name)
    nanogpt_checkpoint(folder / "nanoGPT/out/ckpt.pt", random_model(GPTConfig(16, 256, 2, 2, 16)))
    (folder / "DIR_OF_NANOGPT/model.py").write_text(PEER)
    write_superglue(folder / "superglue")
    for name in ("mine/one.jsonl.gz", "mine/two.jsonl.gz", "books.jsonl.bz2"):
        write_documents(folder / name)
    return folder


@pytest.mark.parametrize("name", [name for name, block in BLOCKS.items() if block])
def test_the_commands_of_a_block_run(name, bash, repository, made, tmp_path, request):
    if "--data-files" in BLOCKS[name]:
        request.getfixturevalue("vocabulary")
    if "tools.evaluate" in BLOCKS[name]:
        pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is not installed")
    folder = shutil.copytree(repository, tmp_path / "repository")
    for path in PRESUPPOSED.get(name, "").split():
        (folder / path).parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", made / path, (folder / path).parent], check=True)
    code, output = bash(BLOCKS[name], folder)
    assert code == 0, output


def test_every_block_of_the_documentation_is_python_or_commands():
    for page in PAGES:
        fences = re.findall(r"^ *(?:```|~~~)(.*)", page.read_text(), re.MULTILINE)
        assert set(fences[::2]) <= {"python", "sh"} and set(fences[1::2]) <= {""}, page
        assert fences[::2].count("sh") == len([name for name in BLOCKS if name.startswith(f"{page.name}:")])
