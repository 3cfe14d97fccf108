"""Every Python snippet of the documentation runs as it stands, in a new interpreter, beside a copy of sophia.py."""

import re
import subprocess
import sys

import pytest
import torch

from run.settings import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = {
    f"{page.name}:{number}": snippet
    for page in PAGES
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL), start=1)
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
# as gloo's threads may abort an interpreter that is being taken down ("terminate called without an active exception")
LEAVE = "\nimport os\nos._exit(0)\n"
DISTRIBUTED = [name for name, snippet in SNIPPETS.items() if snippet.startswith("# torchrun")]


def run(folder, name, *launcher, more=""):
    folder.mkdir(exist_ok=True)
    (folder / "sophia.py").write_text((ROOT / "sophia.py").read_text())
    (folder / "this_file.py").write_text(SNIPPETS[name] + more)
    subprocess.run([sys.executable, *launcher, "this_file.py"], cwd=folder, check=True, timeout=300)


@pytest.mark.parametrize("name", [name for name in SNIPPETS if name not in DISTRIBUTED])
def test_a_snippet_runs(name, tmp_path):
    run(tmp_path, name)


def test_sharded_parameters_give_the_weights_of_one_process(tmp_path):
    (name,) = DISTRIBUTED
    for ranks in (1, 2):
        run(tmp_path / f"{ranks}", name, *TORCHRUN, f"--nproc_per_node={ranks}", more=LEAVE)
    one, two = (torch.load(tmp_path / f"{ranks}" / "weights.pt", weights_only=True) for ranks in (1, 2))
    assert one.std() > 0.1
    assert (one - two).abs().max() < 1e-5


def test_processes_under_accelerate_have_the_same_curvature_and_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (name,) = (name for name, snippet in SNIPPETS.items() if snippet.startswith("# accelerate"))
    state = "{i: [param, sophia.state[param]['hessian']] for i, param in enumerate(params)}"
    save = f"torch.save({state}, f'{{accelerator.process_index}}')"
    run(tmp_path, name, *TORCHRUN, "--nproc_per_node=2", more=save + LEAVE)
    one, two = (torch.load(tmp_path / f"{rank}") for rank in (0, 1))
    assert all(torch.equal(a, b) and a.std() > 0 for i in one for a, b in zip(one[i], two[i], strict=True))
