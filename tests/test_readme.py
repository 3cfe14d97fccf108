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
LAST_LINE = "dist.destroy_process_group()"
DISTRIBUTED = [name for name, snippet in SNIPPETS.items() if snippet.startswith("# torchrun")]


def run(folder, name, *launcher, change=lambda snippet: snippet):
    folder.mkdir(exist_ok=True)
    (folder / "sophia.py").write_text((ROOT / "sophia.py").read_text())
    (folder / "this_file.py").write_text(change(SNIPPETS[name]))
    subprocess.run([sys.executable, *launcher, "this_file.py"], cwd=folder, check=True, timeout=300)


@pytest.mark.parametrize("name", [name for name in SNIPPETS if name not in DISTRIBUTED])
def test_a_snippet_runs(name, tmp_path):
    run(tmp_path, name)


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "fully_shard"])
def test_every_rank_has_the_weights_of_one_process(tmp_path, wrapper):
    (name,) = DISTRIBUTED
    weights = "torch.cat([getattr(param, 'full_tensor', param.detach)().flatten() for param in model.parameters()])"
    save = f"torch.save({weights}, f'{{rank}}'){LEAVE}"

    def change(snippet):
        return snippet.replace("= DistributedDataParallel(", f"= {wrapper}(").replace(LAST_LINE, save)

    for ranks in (1, 2):
        run(tmp_path / f"{ranks}", name, *TORCHRUN, f"--nproc_per_node={ranks}", change=change)
    one, first, second = (torch.load(tmp_path / path) for path in ("1/0", "2/0", "2/1"))
    assert one.std() > 0.1
    assert (one - first).abs().max() < 1e-5
    assert torch.equal(first, second)


def test_processes_under_accelerate_have_the_same_curvature_and_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (name,) = (name for name, snippet in SNIPPETS.items() if snippet.startswith("# accelerate"))
    state = "{i: [param, sophia.state[param]['hessian']] for i, param in enumerate(params)}"
    save = f"torch.save({state}, f'{{accelerator.process_index}}')"
    run(tmp_path, name, *TORCHRUN, "--nproc_per_node=2", change=lambda snippet: snippet + save + LEAVE)
    one, two = (torch.load(tmp_path / f"{rank}") for rank in (0, 1))
    assert all(torch.equal(a, b) and a.std() > 0 for i in one for a, b in zip(one[i], two[i], strict=True))
