"""Few-shot accuracy of trained models, by EleutherAI's lm-evaluation-harness (docs/weights.md).

    python -m tools.evaluate out/gpt2_small_adamw out/gpt2_small_sophiag -o results.json
    python -m tools.evaluate out/gpt2_small_sophiag --tasks=lambada_openai,hellaswag --shots=0

A model is written to a temporary folder as tools.export writes it, and the harness reads it as it reads any other.
"""

import importlib.util
import logging
import math
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from run import errors
from run.files import write_json
from run.machine import find_device
from run.options import Parser, between
from run.settings import ROOT
from sample import load_model
from tools.export import write_model

TASKS = ROOT / "tools" / "tasks"
SUPERGLUE = [f"superglue_{name}" for name in ("boolq", "cb", "copa", "rte")]
SEED = 1234  # for the examples shown; the harness's own
Tasks = dict[str, list]  # by the task's name the harness's tasks, one for each prompt


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="run, checkpoint, GPT-2 weights' folder or hub name")
    add("--tasks", default="superglue", help="comma-separated: superglue, or the harness's own names")
    add("--shots", type=between(0), default=2, help="solved examples shown (default %(default)s)")
    add("--limit", type=between(1), help="examples a task, the first ones, for a quick look")
    add("--data", type=Path, metavar="FOLDER", help="SuperGLUE's files, instead of the hub's")
    add("-o", "--output", type=Path, help="JSON file to write")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--batch_size", type=between(1), default=16, help="texts a forward pass (default %(default)s)")
    options = parser.parse_args()
    if importlib.util.find_spec("lm_eval") is None:
        raise errors.UserError("lm_eval is not installed: pip install -r tools/requirements.txt")
    if options.output and not options.output.absolute().parent.is_dir():
        raise errors.UserError(f"-o: the folder {options.output.parent} does not exist")

    device = str(find_device(options.device))
    with tempfile.TemporaryDirectory() as scratch:
        # what is wrong with a model is better known now than after an hour
        folders = {name: Path(scratch, str(number)) for number, name in enumerate(options.models)}
        weights = {name: export(name, folder) for name, folder in folders.items()}
        tasks = load_tasks(options.tasks.split(","), options.data, options.shots)
        results = {}
        for name, folder in folders.items():
            found = scores(for_harness(folder, device, options.batch_size), tasks, options.limit)
            results[name] = {"weights": weights[name], "tasks": found}
    print(table(results))
    if options.output:
        about = {"lm_eval": version("lm_eval"), "shots": options.shots, "limit": options.limit}
        try:
            write_json(options.output, about | {"models": results})
        except OSError as error:
            raise errors.UserError(f"cannot write {options.output}: {error.strerror}") from None


def export(model: str, folder: Path) -> str:
    """Write a run's, a checkpoint's or another program's model for the harness. Returns what its weights are called."""
    is_run = Path(model).is_dir() and not (Path(model) / "config.json").is_file()
    network, tokenizer, weights = load_model(Path(model), None if is_run else model)
    folder.mkdir()
    write_model(network, tokenizer, folder)
    return weights


def for_harness(folder: Path, device: str, batch_size: int) -> Any:
    """The harness's own model of a Hugging Face folder."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device=device, dtype="float32", batch_size=batch_size)


def load_tasks(names: list[str], data: Path | None, shots: int) -> Tasks:
    """The harness's tasks with their data: of SuperGLUE's five each, one for each prompt."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every setting that is not its default
    names = [name for given in names for name in (SUPERGLUE if given == "superglue" else [given])]
    manager = TaskManager(include_path=TASKS, include_defaults=not set(names) <= set(SUPERGLUE))
    tasks = {}
    for name in names:
        if name not in manager.all_tasks:
            raise errors.UserError(f"--tasks: {name!r} is not superglue and no task of the harness: lm-eval ls tasks")
        try:
            leaves = manager.load(local_prompts(name, data) if data and name in SUPERGLUE else [name])["tasks"]
        except (OSError, ValueError, KeyError, DatasetsError, TemplateError) as error:
            hint = "" if data else ": hub data sets need a network, --data=FOLDER reads SuperGLUE's files"
            raise errors.UserError(f"the data of {name} cannot be had ({error.__cause__ or error}){hint}") from None
        tasks |= {name: [*leaves.values()]} if name in SUPERGLUE else {leaf: [task] for leaf, task in leaves.items()}
    for name, task in ((name, task) for name, prompts in tasks.items() for task in prompts):
        if shots and (count := len(task.sampler.fewshot_docs())) <= shots:
            raise errors.UserError(f"--shots {shots}: {name} has only {count} examples, which must be more")
        if task.get_config("num_fewshot") != 0:  # as the harness does: some tasks have their examples in the prompt
            task.set_config("num_fewshot", shots)
    return tasks


def local_prompts(name: str, data: Path) -> list[dict[str, Any]]:
    """The prompts of a SuperGLUE task for local files, named as in the archive, BoolQ/val.jsonl, or on the hub."""
    import yaml

    short = name.removeprefix("superglue_")
    files = {path.stem: str(path) for path in data.glob("*/*.jsonl") if path.parent.name.lower() == short}
    files = {"train": files.get("train"), "validation": files.get("validation") or files.get("val")}
    for split, path in files.items():
        if not path:
            raise errors.UserError(f"--data: there is no {data / short / split}.jsonl")
    group = yaml.safe_load((TASKS / f"{short}.yaml").read_text(encoding="utf-8"))
    shared = {key: value for key, value in group.items() if key not in ("group", "task", "aggregate_metric_list")}
    source = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    return [shared | prompt | source | {"task": f"{name}::{prompt['task']}"} for prompt in group["task"]]


def scores(model: Any, tasks: Tasks, limit: int | None) -> dict[str, Any]:
    """The metrics of each task and their standard errors; of a task with several prompts the mean over them."""
    from lm_eval.api.metrics import mean
    from lm_eval.evaluator import evaluate

    leaves = {task.task_name: task for prompts in tasks.values() for task in prompts}
    for task in leaves.values():
        task.set_fewshot_seed(SEED)  # every model and every prompt shows the same examples
    found, entries = evaluate(model, {"tasks": leaves}, limit=limit, bootstrap_iters=0), {}
    for name, prompts in tasks.items():
        samples = [found["samples"][task.task_name] for task in prompts]
        entries[name] = entry = {"examples": len(samples[0])}
        for metric in samples[0][0]["metrics"]:
            each = [found["results"][task.task_name][f"{metric},none"] for task in prompts]
            entry[metric], entry[f"{metric}_stderr"] = fmean(each), None
            if prompts[0].aggregation()[metric] is mean and len(samples[0]) > 1:
                # prompts ask about the same examples: only the examples are independent of each other
                values = [fmean(sample[metric] for sample in example) for example in zip(*samples, strict=True)]
                entry[f"{metric}_stderr"] = stdev(values) / math.sqrt(len(values))
            if len(prompts) > 1:
                entry[f"{metric}_of_prompts"] = each
    if set(SUPERGLUE) <= entries.keys():
        entries["superglue"] = average([entries[name] for name in SUPERGLUE])
    return entries


def average(entries: list[dict[str, Any]]) -> dict[str, Any]:
    errors_of = [entry["acc_stderr"] for entry in entries]
    error = math.hypot(*errors_of) / len(entries) if None not in errors_of else None
    return {"acc": fmean(entry["acc"] for entry in entries), "acc_stderr": error}


def table(results: dict[str, Any]) -> str:
    """A row for each metric of each task, a column for each model."""
    rows = [["", *results]]
    first = next(iter(results.values()))["tasks"]
    for task, entry in first.items():
        for metric in (key.removesuffix("_stderr") for key in entry if key.endswith("_stderr")):
            cells = [result["tasks"][task] for result in results.values()]
            rows.append([f"{task} {metric}", *(cell(found[metric], found[f"{metric}_stderr"]) for found in cells)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def cell(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.3f} ± {error:.3f}"


if __name__ == "__main__":
    errors.run(main)
