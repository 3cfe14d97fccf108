"""Damage the checkpoints of a run in random ways and load what is left: each time the damage has to be found out, or
to have changed nothing.

    python -m tests.stress.damage_checkpoints --damages 1000
"""

import argparse
import collections
import contextlib
import io
import random
import shutil
import sys
import tempfile
from pathlib import Path

import train
from model import GPT
from run.errors import UserError
from tests.conftest import TINY, arguments, text_dataset
from training import checkpoints

NAMES = (*checkpoints.FILES, checkpoints.SUMS)


def damage(folders: list[Path], chance: random.Random) -> str:
    """Do one harm to one of two checkpoints. Returns its kind."""
    folder, other = chance.sample(folders, 2)
    path = folder / chance.choice(NAMES)
    content = path.read_bytes() if path.is_file() else b""
    if not content:
        return "none: an earlier harm took it"
    place, noise = chance.randrange(len(content)), chance.randbytes(chance.randrange(1, 64))
    contents = {
        "flip": content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :],  # a bit
        "bits": content[:place] + noise + content[place + len(noise) :],
        "cut": content[:place],
        "grow": content + noise,
        "blank": content[:place] + bytes(min(512, len(content) - place)) + content[place + 512 :],  # a sector
        "empty": b"",
    }
    others = ["missing", "folder", "swap", "exchange", "copy", "rename", "remove"]
    kind = chance.choice(["flip", "flip", *contents, *others])
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "swap":  # two files of a checkpoint
        second = folder / chance.choice([name for name in NAMES if name != path.name])
        exchange(path, second)
    elif kind == "exchange":  # a file with the other checkpoint
        exchange(path, other / path.name)
    elif kind == "copy":
        shutil.copyfile(other / path.name, path)
    elif kind == "rename":
        exchange(folder, other)
    else:
        shutil.rmtree(folder)
    return kind


def exchange(a: Path, b: Path) -> None:
    aside = a.with_name("aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


def load(out_dir: Path) -> tuple:
    """All that a run goes on from."""
    checkpoint = checkpoints.newest(out_dir)
    model = GPT(checkpoint.config)
    checkpoint.load_model(model)
    tensors = [model.state_dict(), checkpoint.optimizer_state()]
    data = [{name: tensor.numpy().tobytes() for name, tensor in part.items()} for part in tensors]
    return checkpoint.progress, checkpoint.settings, data


def run(scratch: Path, damages: int, seed: int = 0) -> collections.Counter:
    """What came of each of `damages` tries, each with one to three harms. AssertionError where something was loaded
    that no checkpoint was; any error but a UserError ends it.
    """
    settings = TINY | {"optimizer": "sophiag", "dataset": text_dataset(scratch / "data"), "out_dir": scratch / "run"}
    sys.argv = ["train.py", *arguments(**settings)]
    train.main()
    shutil.rmtree(scratch / "run/checkpoints/step_00000000", ignore_errors=True)
    newest = load(scratch / "run")
    shutil.copytree(scratch / "run", scratch / "first")
    shutil.rmtree(scratch / "first/checkpoints/step_00000020")
    first = load(scratch / "first")
    assert (newest[0].step, first[0].step) == (20, 10)
    chance = random.Random(seed)
    outcomes: collections.Counter = collections.Counter()
    for number in range(damages):
        out_dir = scratch / "damaged"
        shutil.copytree(scratch / "run", out_dir)
        kinds = []
        with contextlib.suppress(OSError):  # a second harm to what is gone already
            for _ in range(chance.choice([1, 1, 2, 3])):
                folders = checkpoints.folders(out_dir)
                if len(folders) == 2:
                    kinds.append(damage(folders, chance))
        try:
            with contextlib.redirect_stderr(io.StringIO()) as printed:
                loaded = load(out_dir)
        except UserError as error:
            assert len(str(error).splitlines()) == 1, error
            outcomes["refused: no whole checkpoint was left"] += 1
        else:
            if loaded == newest:
                outcomes["harmless: the newest checkpoint was as written"] += 1
            else:
                assert loaded == first, f"damage {number} ({kinds}) was loaded"
                gone = not (out_dir / "checkpoints/step_00000020").exists()
                assert gone or "taking step_00000010" in printed.getvalue()
                outcomes["found out: the checkpoint before was taken"] += 1
        shutil.rmtree(out_dir)
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run(Path(folder), options.damages, options.seed)
    for outcome, count in outcomes.items():
        print(f"{count:5} {outcome}")
    print("    0 loaded wrongly, 0 other errors")
