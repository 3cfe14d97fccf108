"""tools.evaluate: a run as the lm-evaluation-harness sees it, and SuperGLUE on small files of made-up examples."""

import copy
import importlib.util
import json
import math
import shutil
from statistics import fmean, stdev

import pytest
import torch

from data.tokenizers import TOKENIZERS
from model import GPT, GPTConfig
from tools import evaluate
from tools.export import write_model

BYTES = TOKENIZERS["bytes"]
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="the lm-evaluation-harness is not installed: pip install -r tools/requirements.txt",
)

WORDS = {
    "cb": ["entailment", "contradiction", "neutral"],
    "rte": ["entailment", "not_entailment"],
}
EXAMPLES = {  # number i of a task, as SuperGLUE's files have it
    "boolq": lambda i: {"question": f"is box {i} red", "passage": f"Box {i} is red.", "label": i % 3 == 0, "idx": i},
    "cb": lambda i: {"premise": f"Tom has {i} hats.", "hypothesis": "Tom has hats", "label": WORDS["cb"][i % 3]},
    "copa": lambda i: {
        "premise": f"Cup {i} broke.", "choice1": "It fell.", "choice2": "It was dry.",
        "question": ["cause", "effect"][i % 2], "label": int(i % 4 == 0), "idx": i,
    },
    "rte": lambda i: {"premise": f"Ann has {i} hens.", "hypothesis": "Ann has hens.", "label": WORDS["rte"][i % 2]},
}  # fmt: skip
LABELS = {"boolq": lambda i: i % 3 == 0, "cb": lambda i: i % 3, "copa": lambda i: i % 4 == 0, "rte": lambda i: i % 2}
FOLDERS = {"boolq": "BoolQ/train BoolQ/val", "cb": "CB/train CB/val", "copa": "copa/train copa/validation",
           "rte": "RTE/train RTE/val"}  # fmt: skip
SHOWN, ASKED = range(100, 105), range(10, 17)  # the numbers of the examples for training and for validation


def write_superglue(folder):
    for name, files in FOLDERS.items():
        for file, numbers in zip(files.split(), (SHOWN, ASKED), strict=True):
            path = folder / f"{file}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(EXAMPLES[name](i)) + "\n" for i in numbers))
    return folder


@pytest.fixture(scope="module")
def superglue(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield write_superglue(tmp_path_factory.mktemp("superglue"))


@pytest.fixture(scope="module")
def tasks(superglue):
    return evaluate.load_tasks(["superglue"], superglue, shots=2)


@pytest.fixture(scope="module")
def gpt():
    """A model that is sure of what it says, wrong as it is."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=256, n_layer=2, n_head=2, n_embd=16))
    for parameter in model.parameters():
        parameter.data *= 8 if parameter.dim() == 2 else 1
    return model


def instances(*pairs):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]


def plain_score(model, context, answer):
    """In float64, of one sequence without padding."""
    tokens = [*context, *answer][-model.config.block_size - 1 :]
    logits = copy.deepcopy(model).double()(torch.tensor([tokens[:-1]]))[0, -len(answer) :]
    answer = torch.tensor(list(answer))
    return logits.log_softmax(-1).gather(1, answer[:, None]).sum().item(), bool((logits.argmax(-1) == answer).all())


@needs_harness
def test_the_harness_scores_an_answer_as_the_model_does(gpt, tmp_path):
    write_model(gpt, BYTES, tmp_path)
    long = "It goes on and on, and then it goes on again until"  # more than the model's 32 tokens
    pairs = [("The sun is", " up."), ("Two words", " or more"), (long, " noon"), ("", "Once")]
    found = evaluate.for_harness(tmp_path, "cpu", batch_size=4).loglikelihood(instances(*pairs), disable_tqdm=True)
    contexts = [context.encode() or [BYTES.end_of_text] for context, _ in pairs]
    expected = [plain_score(gpt, context, pair[1].encode()) for context, pair in zip(contexts, pairs, strict=True)]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


class Rigged:
    """Stands for a model: gives every answer the score that `score` gives its request."""

    def __new__(cls, score):
        from lm_eval.api.model import LM

        class Model(LM):
            loglikelihood_rolling = generate_until = None

            def loglikelihood(self, requests):
                return [(score(request), False) for request in requests]

        return Model()


@needs_harness
def test_accuracies_and_their_errors_are_means_over_prompts_and_count_each_example_once(tasks):
    found = evaluate.scores(Rigged(lambda r: float(r.idx == LABELS[task_of(r)](number_of(r)))), tasks, None)
    for entry in found.values():
        assert (entry["acc"], entry["acc_stderr"]) == (1, 0)

    # the answer is the first for three of the prompts and the second for the others
    prompts = {task.task_name for group in tasks.values() for task in list(group)[:3]}
    found, errors = evaluate.scores(Rigged(lambda r: r.idx * (-1 if r.task_name in prompts else 1)), tasks, None), []
    for name, label in LABELS.items():
        right = [float(label(i) == 0) for i in ASKED]
        wrong = [float(label(i) == len(set(map(label, ASKED))) - 1) for i in ASKED]
        means = [(3 * first + 2 * last) / 5 for first, last in zip(right, wrong, strict=True)]
        entry = found[f"superglue_{name}"]
        assert (entry["examples"], entry["acc"]) == (len(ASKED), pytest.approx(fmean(means)))
        assert entry["acc_of_prompts"] == [pytest.approx(fmean(x)) for x in [right] * 3 + [wrong] * 2]
        assert entry["acc_stderr"] == pytest.approx(stdev(means) / math.sqrt(len(means)))
        errors.append(entry["acc_stderr"])
    mean = found["superglue"]
    assert mean["acc"] == pytest.approx(fmean(found[f"superglue_{name}"]["acc"] for name in LABELS))
    assert mean["acc_stderr"] == pytest.approx(math.sqrt(sum(error**2 for error in errors)) / 4)
    one = {"superglue_rte": tasks["superglue_rte"]}
    assert "superglue" not in evaluate.scores(Rigged(lambda r: -r.idx), one, None)


def number_of(request):
    """Which of the made-up examples a request is about."""
    return next(i for i in ASKED if subject(EXAMPLES[task_of(request)](i)) == subject(request.doc))


def subject(example):
    """The sentence that no other example of the task has."""
    return example.get("passage") or example["premise"]


def task_of(request):
    return request.task_name.removeprefix("superglue_").split("::")[0]


@needs_harness
def test_every_prompt_asks_in_its_own_words_and_shows_two_solved_examples(tasks):
    seen = []
    evaluate.scores(Rigged(lambda request: seen.append(request) or 0.0), tasks, 2)
    pools = {name: [EXAMPLES[name](i) for i in SHOWN] for name in LABELS}
    for request in seen:
        context, answer = request.args
        assert context.count(subject(request.doc).rstrip(".")) == 1 and not context[-1].isspace() and answer[0] == " "
        assert sum(subject(example).rstrip(".") in context for example in pools[task_of(request)]) == 2
    firsts = {request.task_name: request.args[0].split("\n\n")[-1] for request in seen}
    assert len(set(firsts.values())) == len(firsts) == 20


@needs_harness
def test_several_checkpoints_stand_side_by_side_in_the_table_and_in_the_file(train, call, superglue, tmp_path):
    runs = [tmp_path / "one", tmp_path / "two"]
    for seed, run in enumerate(runs):
        train(run, max_iters=1, block_size=64, seed=seed)
    output = tmp_path / "results.json"
    printed = call(evaluate, *runs, "--data", superglue, "--limit", 2, "--device", "cpu", "-o", output).splitlines()
    assert printed[0].split() == [str(run) for run in runs]
    assert [line.split()[0] for line in printed[1:]] == [*(f"superglue_{name}" for name in LABELS), "superglue"]
    written = json.loads(output.read_text())
    assert (written["shots"], written["limit"], list(written["models"])) == (2, 2, [str(run) for run in runs])
    for run in runs:
        model = written["models"][str(run)]
        assert model["weights"] == str(run / "checkpoints" / "step_00000001")
        mean = model["tasks"]["superglue"]
        assert f"{mean['acc']:.3f} ± {mean['acc_stderr']:.3f}" in printed[-1]
    one_task = ["--tasks", "superglue_copa", "--limit", 1, "--shots", 0, "--device", "cpu"]
    assert "±" not in call(evaluate, runs[0], "--data", superglue, *one_task)  # one example has no standard error


def test_without_the_harness_it_says_what_to_install(refused, call, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install -r tools/requirements.txt" in refused(lambda: call(evaluate, "nowhere"))


@needs_harness
def test_evaluate_refuses_what_it_cannot_use(refused, call, train, superglue, tmp_path):
    train(run := tmp_path / "run", max_iters=1)
    folder, other = tmp_path / "data" / "boolq", {"data": tmp_path / "data", "shots": 0}
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"question": "is it", "label": 1}\n')

    def line(model=run, **options):
        flags = [f"--{name}={value}" for name, value in {"data": superglue, "device": "cpu", **options}.items()]
        return refused(lambda: call(evaluate, model, *flags))

    assert "no checkpoint in" in line(tmp_path)
    assert "'superglu' is not superglue and no task of the harness" in line(tasks="superglu")
    assert "superglue_boolq has only 5 examples" in line(shots=5)
    assert "the folder" in line(output=tmp_path / "nowhere" / "x.json")
    assert f"there is no {folder / 'validation.jsonl'}" in line(**other)
    shutil.copyfile(folder / "train.jsonl", folder / "validation.jsonl")
    assert "'passage' is undefined" in line(**other)
    (folder / "validation.jsonl").write_text("nonsense")
    assert "superglue_boolq cannot be had" in line(**other)
