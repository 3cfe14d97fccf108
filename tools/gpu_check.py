"""The first minutes on a new GPU machine: the tests that need CUDA, then 30 steps of every optimizer at 125M.

    make gpu-check
    python -m tools.gpu_check [--name=value …]     the same with other settings, for every optimizer

Prints its figures and writes them to gpu_check.json in out_dir (out). Ends with 1 where anything failed.
"""

import os
import shlex
import subprocess
import sys
from argparse import Namespace
from datetime import datetime
from pathlib import Path
from typing import Any

from run import errors
from run.files import write_json
from run.machine import Machine, set_up
from run.options import Parser
from run.settings import ROOT, Settings, read
from tools.benchmark import WARM_UP, describe, train
from training.batches import check_batch

STEPS = 30
# An eighth of the paper's batch, and so of its sequences for curvature, in passes meant for 24 GB
COMMON = ["--out_dir=out", "--device=cuda", "--batch_size=60", "--micro_batch_size=10"]
RUNS = {
    "adamw": ["gpt2_small_adamw.py"],
    "lion": ["gpt2_small_lion.py"],
    "muon": ["gpt2_small_muon.py"],
    "sophiah": ["gpt2_small_sophiah.py", "--hessian_batch_size=4"],
    "sophiag": ["gpt2_small_sophiag.py", "--hessian_batch_size=30"],
    "sophiag-averaged": ["gpt2_small_sophiag.py", "--hessian_estimator=averaged", "--hessian_batch_size=4"],
}


def run_tests(device: str) -> bool:
    """Run tests/test_gpu.py on the device. Returns whether all is well."""
    command = [sys.executable, "-m", "pytest", "-v", "tests/test_gpu.py"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"TEST_DEVICE": device}).returncode == 0


def measure_steps(settings: Settings, machine: Machine) -> dict[str, Any]:
    """The figures of STEPS steps, taken in a process of their own; or the error that ended them."""
    steps_of_a_round = 2 if settings.uses_curvature else 1  # with an estimate, and without
    options = Namespace(peer=[], rounds=STEPS // steps_of_a_round - WARM_UP)
    try:
        result = train(options, settings, machine)
    except errors.UserError as error:
        return {"error": f"FAILED: {errors.one_line(str(error))}"}
    mfu, peak = result["mfu_ours"], result["peak_bytes_ours"]
    return {
        "tokens_per_s": round(result["tokens_per_second_ours"]),
        "mfu": mfu and round(mfu, 3),
        "peak_gb": round(peak / 1e9, 1),
        "curvature": round(result["curvature_share_ours"], 3),
        "first_step_s": round(result["seconds_to_first_step_ours"]),
    }


def main() -> None:
    _, arguments = Parser(__doc__).parse_known_args()
    runs = {name: read([f"{ROOT}/config/{run[0]}", *run[1:], *COMMON, *arguments]) for name, run in RUNS.items()}
    for settings in runs.values():
        check_batch(settings, ranks=1)
    machine = set_up(settings)
    path = Path(settings.out_dir, "gpu_check.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "date": datetime.now().isoformat(" ", "minutes"),
        "command": shlex.join(["python", "-m", "tools.gpu_check", *arguments]),
        **describe(machine),
        "step": f"{settings.batch_size} x {settings.block_size} tokens, micro_batch_size {settings.micro_batch_size}",
        "tests_passed": run_tests(machine.device.type),
        "optimizers": {name: measure_steps(settings, machine) for name, settings in runs.items()},
    }
    write_json(path, report)
    print(path.read_text(encoding="utf-8"), path, sep="\n")
    if not report["tests_passed"] or any("error" in row for row in report["optimizers"].values()):
        sys.exit(1)


if __name__ == "__main__":
    errors.run(main)
