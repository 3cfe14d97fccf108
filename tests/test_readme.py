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
DISTRIBUTED = [name for name, snippet in SNIPPETS.items() if snippet.startswith("# torchrun")]


def run(folder, name, *launcher):
    folder.mkdir(exist_ok=True)
    (folder / "sophia.py").write_text((ROOT / "sophia.py").read_text())
    (folder / "this_file.py").write_text(SNIPPETS[name])
    subprocess.run([sys.executable, *launcher, "this_file.py"], cwd=folder, check=True, timeout=300)


@pytest.mark.parametrize("name", [name for name in SNIPPETS if name not in DISTRIBUTED])
def test_a_snippet_runs(name, tmp_path):
    run(tmp_path, name)


def test_sharded_parameters_give_the_weights_of_one_process(tmp_path):
    (name,) = DISTRIBUTED
    for ranks in (1, 2):
        run(tmp_path / f"{ranks}", name, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    one, two = (torch.load(tmp_path / f"{ranks}" / "weights.pt", weights_only=True) for ranks in (1, 2))
    assert one.std() > 0.1
    assert (one - two).abs().max() < 1e-5
