"""Every Python snippet of the README runs as it stands, in a fresh interpreter."""

import re
import subprocess
import sys

import pytest

from training.settings import ROOT

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs(number, tmp_path):
    (tmp_path / "sophia.py").write_text((ROOT / "sophia.py").read_text())  # the file alone
    subprocess.run([sys.executable, "-c", SNIPPETS[number]], cwd=tmp_path, check=True, timeout=300)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2
