"""What `pip install .` installs."""

import shutil
import subprocess
import sys
import zipfile

from run.settings import ROOT


def test_the_package_is_the_two_optimizers_and_each_again_as_its_stubs(tmp_path):
    for name in ("sophia.py", "lion.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)  # because a build leaves files beside the sources
    shutil.copytree(ROOT / "stubs", tmp_path / "stubs", symlinks=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-build-isolation", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", tmp_path / "wheel", tmp_path], check=True, timeout=300)
    with zipfile.ZipFile(next((tmp_path / "wheel").iterdir())) as wheel:
        files = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {}
    for name in ("sophia", "lion"):
        expected |= dict.fromkeys((f"{name}.py", f"{name}-stubs/__init__.pyi"), (ROOT / f"{name}.py").read_bytes())
    assert files == expected
