"""lm-eval on our models: its figures are those of our own evaluation, and what we cannot do is refused in one message."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from test_continuations import PAIRS, SHARED, model

from blt.byte_ids import BYTE_OFFSET
from blt.continuations import score_continuations
from blt.harness import HarnessModel, _manager, evaluate_tasks, generation_options
from blt.harness_tasks import is_included
from blt.language_model import LanguageModel
from blt.progress import Reporter
from blt.shapes import ByteIds, Logits, PatchStarts

Blt = Callable[..., Any]
TEXTS = ["def f(x):\n    return x\n" * 9, "één tekst, kort", "x"]


class Uniform(LanguageModel):
    """All 256 bytes are equally likely, whatever came before."""

    def predict(self, ids: ByteIds) -> tuple[Logits, None, PatchStarts]:
        logits = torch.zeros(*ids.shape, 260)
        logits[..., :BYTE_OFFSET] = -torch.inf
        return logits, None, self.patch_starts(ids)


def asked(lm: LanguageModel, window_bytes: int = 64) -> HarnessModel:
    return HarnessModel(lm, window_bytes, Reporter(quiet=True))


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """YAML files of tasks with files of their own, as a user may have them."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "texts": [{"text": text} for text in TEXTS],
        "asked": [{"q": "1 + 1 =", "a": "2"}, {"q": "2 + 2 =", "a": "4"}, {"q": "3 + 3 =", "a": "6"}],
    }
    for name, objects in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in objects))
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    written = {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
    }
    configs = {
        "my_text": ("texts", rolling),
        "my_answers": ("asked", written),
        "my_beams": ("asked", written | {"generation_kwargs": {"until": [], "num_beams": 4}}),
        "my_essays": ("asked", written | {"generation_kwargs": {"until": [], "max_gen_toks": 5000}}),
        "my_gap": ("nonesuch", rolling),
    }
    for name, (data, config) in configs.items():
        files = {"data_files": {"test": str(folder / f"{data}.jsonl")}, "cache_dir": str(folder / "cache")}
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | config))
    (folder / "chatter.py").write_text("def text(doc):\n    print('asked', doc['q'])\n    return doc['q']\n")
    chatty = (folder / "my_answers.yaml").read_text().replace("'{{q}}'", "!function chatter.text")
    (folder / "my_chatter.yaml").write_text(chatty.replace("my_answers", "my_chatter"))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not even asked."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def run(tiny_training: Any) -> Path:
    """The tiny run, to be read only."""
    return tiny_training.run


# agreements


@pytest.mark.parametrize("window_bytes", [16, 4096])
def test_lm_evals_bits_per_byte_are_those_of_our_evaluation(
    window_bytes: int, run: Path, tasks_folder: Path, blt_command: Blt
) -> None:
    window, task = ["--window-bytes", window_bytes], tasks_folder / "my_text.yaml"
    figures = blt_command(
        "evaluate", run, *window, "--data", tasks_folder / "texts.jsonl", "--tasks", task, "--json"
    ).json
    of_task = figures["tasks"]["my_text"]
    assert of_task["bits_per_byte"] == pytest.approx(figures["bits_per_byte"], abs=1e-6)
    assert of_task["byte_perplexity"] == pytest.approx(2 ** figures["bits_per_byte"], rel=1e-6)
    assert of_task["documents"] == 3 and figures["bytes"] == sum(len(text.encode()) for text in TEXTS)


def test_a_uniform_model_gives_eight_bits_per_byte(tasks_folder: Path) -> None:
    lm = model("space")
    uniform = asked(Uniform(lm.config, None, lm.network))
    figures = evaluate_tasks(uniform, [str(tasks_folder / "my_text.yaml")])
    assert figures["my_text"]["bits_per_byte"] == pytest.approx(8.0, abs=1e-6)
    assert uniform.loglikelihood(instances("loglikelihood", ("x", "four"))) == [
        (pytest.approx(-4 * math.log(256), abs=1e-5), False)
    ]


def test_lm_eval_by_itself_says_what_blt_evaluate_says(tasks_folder: Path) -> None:
    lm, task = model("entropy"), str(tasks_folder / "my_text.yaml")
    theirs = simple_evaluate(asked(lm), tasks=[task], task_manager=TaskManager(include_defaults=False))
    ours = evaluate_tasks(asked(lm), [task])["my_text"]
    assert ours["bits_per_byte"] == theirs["results"]["my_text"]["bits_per_byte,none"]


def test_likelihoods_are_those_of_continuations() -> None:
    lm = model("entropy")
    found = asked(lm).loglikelihood(instances("loglikelihood", *PAIRS))
    assert found == [(one.log_likelihood, one.is_greedy) for one in score_continuations(lm, PAIRS)]


def test_generation_is_the_models_own_up_to_a_stop_string() -> None:
    lm = model("entropy", max_bytes=200)
    prompts = [text for text, _ in PAIRS[:3]] + ["other", SHARED * 5]
    whole = {"until": [], "max_gen_toks": 30, "do_sample": False}
    free = asked(lm).generate_until(instances("generate_until", *((prompt, whole) for prompt in prompts)))
    longest = lm.config.max_bytes - 1 - 30
    alone = [lm.generate(prompt.encode()[-longest:], 30) for prompt in prompts]
    assert free == [text.decode("utf-8", "replace") for text in alone if isinstance(text, bytes)]
    stop = free[0][7:9]
    options = {"until": [stop], "max_gen_toks": 30}
    mixed = instances("generate_until", (prompts[0], options), (prompts[3], whole), (prompts[0], options))
    first = free[0][: free[0].index(stop)]
    assert asked(lm).generate_until(mixed) == [first, free[3], first]


def test_sampling_is_drawn_with_the_seed_and_repeats_differ() -> None:
    lm, options = model("entropy"), {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    requests = instances("generate_until", *[("x", options)] * 3)
    texts = [HarnessModel(lm, 64, Reporter(quiet=True), seed).generate_until(requests) for seed in (0, 0, 7)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 3


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"until": "\n", "max_new_tokens": 4}, {"max_bytes": 4, "stop": ["\n"], "temperature": 0.0}),
        ({"until": [""], "temperature": 0.7, "do_sample": False}, {"max_bytes": 256, "stop": [], "temperature": 0.0}),
        (
            {"until": [], "temperature": 0.7, "top_p": 0.9, "top_k": 0, "num_beams": 1},
            {"max_bytes": 256, "stop": [], "temperature": 0.7, "top_p": 0.9},
        ),
        ({"do_sample": True}, {"max_bytes": 256, "stop": [], "temperature": 1.0}),
    ],
)
def test_what_a_task_asks_of_generation_is_put_in_our_words(given: dict[str, Any], options: dict[str, Any]) -> None:
    assert generation_options(given) == options


# the command


def test_tasks_alone_are_all_that_is_evaluated(run: Path, tasks_folder: Path, blt_command: Blt) -> None:
    task = tasks_folder / "my_answers.yaml"
    evaluated = blt_command("evaluate", run, "--tasks", task, "--json", "--limit", 2)
    assert evaluated.json == {"tasks": {"my_answers": {"exact_match": 0.0, "documents": 2}}}
    assert evaluated.stderr == f"loading {task}\ngeneration 100%  2 of 2\n"
    shown = blt_command("evaluate", run, "--tasks", task, "--quiet", "--few-shot", 1)
    assert shown.stderr == ""
    heading, row = shown.stdout.decode().splitlines()
    assert heading.split() == ["task", "exact_match", "documents"] and row.split() == ["my_answers", "0", "3"]


def test_what_a_tasks_own_code_prints_is_no_part_of_the_one_json_object(
    run: Path, tasks_folder: Path, blt_command: Blt
) -> None:
    evaluated = blt_command("evaluate", run, "--tasks", tasks_folder / "my_chatter.yaml", "--json", "--quiet")
    assert set(evaluated.json["tasks"]) == {"my_chatter"} and "asked 1 + 1 =" in evaluated.stderr


def test_a_name_may_be_one_below_the_include_path_and_an_unknown_one_is_answered_with_close_ones(
    run: Path, tasks_folder: Path, blt_command: Blt
) -> None:
    include = ["--include-path", tasks_folder]
    assert set(blt_command("evaluate", run, "--tasks", "my_text", *include, "--json").json["tasks"]) == {"my_text"}
    for name, meant in (("my_texd", "my_text"), ("helaswag_local", "hellaswag_local"), ("arc_esy", "arc_easy")):
        refused = blt_command("evaluate", run, "--tasks", name, *include, "--quiet")
        assert refused.code == 1 and refused.stdout == b"" and refused.stderr.count("\n") == 1
        assert f"no task {name}; did you mean" in refused.stderr and meant in refused.stderr
    without = blt_command("evaluate", run, "--tasks", "arc_easy", *include, "--quiet")
    assert without.code == 1 and "ConnectionError" in without.stderr and without.stderr.count("\n") == 1
    assert "takes a network" in without.stderr and "--task-data" in without.stderr


def test_our_names_are_none_of_lm_evals(tasks_folder: Path) -> None:
    assert not [name for name in _manager(tasks_folder).all_tasks if is_included(name)]


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("my_beams.yaml", "num_beams=4"),
        ("my_essays.yaml", "5000 new bytes (max_gen_toks), and this model can hold 511"),
        ("my_gap.yaml", "my_gap.yaml could not be loaded (FileNotFoundError"),
        ("nonesuch.yaml", "no task file"),
    ],
)
def test_a_task_that_cannot_be_done_says_why(
    task: str, said: str, run: Path, tasks_folder: Path, blt_command: Blt
) -> None:
    refused = blt_command("evaluate", run, "--tasks", tasks_folder / task, "--quiet")
    assert refused.code == 1 and refused.stdout == b"" and refused.stderr.count("\n") == 1
    assert said in refused.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (["--few-shot", "-1"], "few_shot must be at least 0, got -1"),
        (["--few-shot", "9"], "few_shot 9 is more than the 3 examples that my_answers can show"),
        (["--include-path", "nonesuch"], "no folder nonesuch with YAML files of tasks"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(
    options: list[str], said: str, run: Path, tasks_folder: Path, blt_command: Blt
) -> None:
    refused = blt_command("evaluate", run, "--tasks", tasks_folder / "my_answers.yaml", *options, "--quiet")
    assert refused.code == 1 and said in refused.stderr and refused.stderr.count("\n") == 1


def test_a_task_that_is_missing_is_named_before_data_is_scored(run: Path, blt_command: Blt, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("def f(): pass\n" * 9)
    refused = blt_command("evaluate", run, "--data", text, "--tasks", tmp_path / "nonesuch.yaml")
    assert refused.code == 1 and "no task file" in refused.stderr and "evaluation" not in refused.stderr


def test_options_of_tasks_without_a_task_are_refused(run: Path, blt_command: Blt) -> None:
    refused = blt_command("evaluate", run, "--limit", "3")
    assert refused.code == 1 and "name some with --tasks" in refused.stderr


def test_without_lm_eval_the_extra_is_named(run: Path, blt_command: Blt, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "blt.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused = blt_command("evaluate", run, "--tasks", "cute")
    assert refused.code == 1 and "pip install 'blt-lm[eval]' -c constraints.txt" in refused.stderr
