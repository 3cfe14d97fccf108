"""Every Python snippet of the README runs as it stands, in a fresh interpreter, beside a copy of sophia.py alone."""

import re
import subprocess
import sys

import pytest
import torch

from run.settings import ROOT

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
DISTRIBUTED = [snippet for snippet in SNIPPETS if snippet.startswith("# torchrun")]


def run(folder, snippet, *launcher):
    folder.mkdir(exist_ok=True)
    (folder / "sophia.py").write_text((ROOT / "sophia.py").read_text())
    (folder / "this_file.py").write_text(snippet)
    subprocess.run([sys.executable, *launcher, "this_file.py"], cwd=folder, check=True, timeout=300)


@pytest.mark.parametrize("number", [i for i, snippet in enumerate(SNIPPETS) if snippet not in DISTRIBUTED])
def test_a_snippet_runs(number, tmp_path):
    run(tmp_path, SNIPPETS[number])


def test_sharded_parameters_give_the_weights_of_one_process(tmp_path):
    (snippet,) = DISTRIBUTED
    for ranks in (1, 2):
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
        run(tmp_path / str(ranks), snippet, *launcher)
    one, two = (torch.load(tmp_path / str(ranks) / "weights.pt", weights_only=True) for ranks in (1, 2))
    assert one.std() > 0.1
    assert (one - two).abs().max() < 1e-5
