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


def damage(folders: list[Path], chance: random.Random) -> None:
    """Do one harm to a file of one of two checkpoints, as disks do, and copies that were cut off or mixed up."""
    folder, other = chance.sample(folders, 2)
    path = folder / chance.choice((*checkpoints.FILES, checkpoints.SUMS))
    content, others = (each.read_bytes() if each.exists() else b"" for each in (path, other / path.name))
    if not content:  # an earlier harm took it
        return
    place = chance.randrange(len(content))
    flipped = content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]
    blank = content[:place] + bytes(min(512, len(content) - place)) + content[place + 512 :]  # a sector
    if (harmed := chance.choice([flipped, blank, content[:place], others, None])) is None:
        path.unlink()
    else:
        path.write_bytes(harmed)


def contents(checkpoint: checkpoints.Checkpoint) -> tuple:
    """All that a run goes on from."""
    model = GPT(checkpoint.config)
    checkpoint.load_model(model)
    tensors = [model.state_dict(), checkpoint.optimizer_state()]
    data = [{name: tensor.numpy().tobytes() for name, tensor in part.items()} for part in tensors]
    return checkpoint.progress, checkpoint.settings, data


def outcome(out_dir: Path, first: tuple, newest: tuple) -> str:
    """What comes of loading from a damaged folder. AssertionError where something is loaded that was never written."""
    try:
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            loaded = contents(checkpoints.newest(out_dir))
    except UserError as error:
        assert len(str(error).splitlines()) == 1, error
        return "refused: no whole checkpoint was left"
    if loaded == newest:
        return "harmless: the newest checkpoint was as written"
    assert loaded == first, f"{out_dir} was loaded"
    assert "taking step_00000010" in printed.getvalue()
    return "found out: the checkpoint before was taken"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damages", type=int, default=1000)
    damages, chance, outcomes = parser.parse_args().damages, random.Random(0), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        run, damaged = Path(folder, "run"), Path(folder, "damaged")
        settings = TINY | {"optimizer": "sophiag", "dataset": text_dataset(Path(folder, "data")), "out_dir": run}
        sys.argv = ["train.py", *arguments(**settings)]
        train.main()
        shutil.rmtree(run / "checkpoints/step_00000000", ignore_errors=True)
        first, newest = (contents(checkpoints.read(folder)) for folder in checkpoints.folders(run))
        for _ in range(damages):
            shutil.copytree(run, damaged)
            for _ in range(chance.choice([1, 1, 2, 3])):
                damage(checkpoints.folders(damaged), chance)
            outcomes[outcome(damaged, first, newest)] += 1
            shutil.rmtree(damaged)
    for what, count in outcomes.items():
        print(f"{count:5} {what}")


if __name__ == "__main__":
    main()
