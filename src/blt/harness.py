"""lm-eval's tasks -> figures of one of our models, which answers lm-eval's three questions with exact byte likelihoods.

lm-eval speaks of tokens where we have bytes: a limit of so many new tokens is read as so many bytes.
"""

import contextlib
import difflib
import json
import logging
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
from lm_eval.api.group import AggMetricConfig, Group
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from blt.byte_ids import as_bytes
from blt.continuations import score_continuations
from blt.evaluate import score_documents
from blt.generate import ROWS_TOGETHER
from blt.harness_tasks import INCLUDED, Config, Members, is_included, read_task
from blt.language_model import LanguageModel
from blt.progress import Reporter

FEW_SHOT_SEED = 1234  # lm-eval's own
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1, "use_cache": True}
_SAMPLING = ("top_k", "top_p", "min_p")


class HarnessModel(LM):
    """A model as lm-eval asks it."""

    def __init__(self, lm: LanguageModel, window_bytes: int, reporter: Reporter, seed: int = 0) -> None:
        super().__init__()
        self.lm = lm
        self.window_bytes = window_bytes  # of rolling likelihoods, as in blt evaluate --data
        self.reporter = reporter
        self.seed = seed

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Of each continuation given its context: the natural logarithm, and whether greedy generation would write it.

        A context that does not fit is cut at its beginning; see ``continuations``.
        """
        on_scored = self._progress("likelihoods", len(requests))
        found = score_continuations(self.lm, [request.args for request in requests], on_scored=on_scored)
        return [(one.log_likelihood, one.is_greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Of whole documents, over the windows of ``blt evaluate --data``, so that both report the same bits per byte."""
        documents = [as_bytes(request.args[0]) for request in requests]
        on_scored = self._progress("documents", sum(map(len, documents)))
        window = min(self.window_bytes, self.lm.config.max_bytes)
        scores = score_documents(self.lm.predict, documents, window, self.lm.device, on_scored=on_scored)
        return [-score.bits * math.log(2) for score in scores]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """What the model writes after each context, up to a stop string or the limit; contexts are cut on the left to fit."""
        alike: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True, default=str)].append(index)
        on_written = self._progress("generation", len(requests))
        texts = [""] * len(requests)
        for indices in alike.values():
            options = generation_options(requests[indices[0]].args[1])
            for begin in range(0, len(indices), 4 * ROWS_TOGETHER):
                some = indices[begin : begin + 4 * ROWS_TOGETHER]
                prompts = [self._prompt(requests[index].args[0], options["max_bytes"]) for index in some]
                written = self.lm.generate(prompts, seed=self.seed + begin, **options)
                assert isinstance(written, list)
                for index, text in zip(some, written, strict=True):
                    texts[index] = text.decode("utf-8", "replace")
                on_written(len(some))
        return texts

    def _prompt(self, context: str, max_new_bytes: int) -> bytes:
        longest = self.lm.config.max_bytes - 1
        if max_new_bytes >= longest:
            raise ValueError(
                f"the task asks for up to {max_new_bytes} new bytes (max_gen_toks), and this model can hold {longest} in all; "
                "leave the task out, or make a YAML file of it with a smaller max_gen_toks"
            )
        data = as_bytes(context)
        return data[max(0, len(data) - (longest - max_new_bytes)) :]

    def _progress(self, job: str, total: int) -> Callable[[int], None]:
        """Say at every tenth of a job how far it is."""
        done = 0

        def on_done(number: int) -> None:
            nonlocal done
            before, done = done, done + number
            if 10 * done // total > 10 * before // total:
                self.reporter.show(job, done, total, f"{done:,} of {total:,}")

        return on_done


def generation_options(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What ``LanguageModel.generate`` calls the arguments of a task's generation.

    Tokens are bytes here. Without ``do_sample`` or a temperature the text is greedy. Raises ValueError for an argument that
    would change the text and that we lack.

    >>> generation_options({"until": ["\\n"], "max_gen_toks": 8, "do_sample": False})
    {'max_bytes': 8, 'stop': ['\\n'], 'temperature': 0.0}
    """
    given = dict(normalize_gen_kwargs(dict(asked)))
    sampled = given.pop("do_sample", None)
    temperature = float(given.pop("temperature", 1.0 if sampled else 0.0))
    options = {"max_bytes": given.pop("max_gen_toks"), "stop": [stop for stop in given.pop("until") if stop]}
    options["temperature"] = temperature if sampled else 0.0
    for name in _SAMPLING:
        value = given.pop(name, None)
        if value:  # 0 is another way to say none
            options[name] = value
    unknown = [f"{name}={value}" for name, value in given.items() if name not in _NEUTRAL or _NEUTRAL[name] != value]
    if unknown:
        raise ValueError(
            f"this task asks for {', '.join(unknown)} in generation, which blt does not have; leave the task out, or make a "
            "YAML file of it without"
        )
    return options


def evaluate_tasks(
    model: HarnessModel,
    names: Sequence[str],
    task_data: Path | None = None,
    include_path: Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """The figures of each task and group by name: its metrics, and ``documents``, how many were scored.

    Raises as ``load_tasks``.
    """
    return evaluate_loaded(model, load_tasks(names, model.reporter, task_data, include_path, few_shot, limit), limit)


def load_tasks(
    names: Sequence[str],
    reporter: Reporter,
    task_data: Path | None = None,
    include_path: Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """lm-eval's tasks and groups of these names, with so many examples before each question.

    A name is that of one of our tasks (``harness_tasks``), of one of lm-eval's tasks, groups or tags, of one in a YAML file
    below ``include_path``, or it is such a file. Raises ValueError or OSError that says what to do.
    """
    for option, value, least in (("few_shot", few_shot, 0), ("limit", limit, 1)):
        if value is not None and value < least:
            raise ValueError(f"{option} must be at least {least}, got {value}")
    if include_path is not None and not include_path.is_dir():
        raise FileNotFoundError(f"no folder {include_path} with YAML files of tasks; check --include-path")
    with _third_parties_quiet():
        found = []
        for name in dict.fromkeys(names):
            if not is_included(
                name
            ):  # the index of lm-eval's names takes seconds, a hub that is out of reach half a minute
                reporter.say(f"loading {name}")
            found.append(_load(name, task_data, include_path))
        loaded = TaskManager(include_defaults=False).load([one for some in found for one in some])
        for task in loaded["tasks"].values():
            if few_shot is not None and task.get_config("num_fewshot") != 0:  # 0: the task has no place for any
                _set_few_shot(task, few_shot)
            task.set_fewshot_seed(FEW_SHOT_SEED)
    return dict(loaded)


def evaluate_loaded(
    model: HarnessModel, loaded: dict[str, Any], limit: int | None = None
) -> dict[str, dict[str, float]]:
    """The figures of what ``load_tasks`` gave, of so many documents of each task."""
    with _third_parties_quiet():
        results = evaluate(model, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    return {name: _figures(of_task) for name, of_task in results["results"].items()}


def _set_few_shot(task: Task, few_shot: int) -> None:
    """So many solved examples before each question; ValueError where the task has fewer."""
    if few_shot and isinstance(task, ConfigurableTask):
        from_questions = task.fewshot_cfg.split == task.config.test_split  # then never the question itself
        available = len(task.sampler.df) - from_questions
        if few_shot > available:
            raise ValueError(
                f"few_shot {few_shot} is more than the {available} examples that {task.task_name} can show"
            )
    task.set_config("num_fewshot", few_shot)


def _figures(of_task: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's keys are ``metric,filter``; the filter ``none`` needs no saying.

    >>> _figures({"alias": "x", "sample_len": 4, "acc,none": 0.5, "acc_stderr,none": "N/A", "exact_match,strict": 0})
    {'acc': 0.5, 'exact_match,strict': 0.0, 'documents': 4}
    """
    numbers = {key: value for key, value in of_task.items() if "," in key and not isinstance(value, str)}
    figures = {key.removesuffix(",none"): float(value) for key, value in numbers.items()}
    return figures | {"documents": of_task["sample_len"]} if "sample_len" in of_task else figures


def _load(name: str, task_data: Path | None, include_path: Path | None) -> list[Task | Group]:
    """What one name stands for; a tag for several."""
    if is_included(name):
        return [_built(name, read_task(name, task_data))]
    is_file = name.endswith((".yaml", ".yml"))
    manager = _manager(include_path)
    if is_file and not Path(name).is_file():
        raise FileNotFoundError(f"no task file {name}")
    if not is_file and name not in manager.task_index:
        close = difflib.get_close_matches(name, [*INCLUDED, *manager.all_tasks], n=5)
        meant = f"did you mean {', '.join(close)}?" if close else "lm-eval ls tasks lists its own."
        raise ValueError(f"no task {name}; {meant} Ours are {', '.join(INCLUDED)}; a YAML file is one, too")
    try:
        loaded = manager.load([name])
    except Exception as error:  # whatever a hub, a file or a task's own code may raise
        raise ValueError(
            f"task {name} could not be loaded ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). "
            "lm-eval's tasks read the hub, which takes a network or an earlier download; without one, name a YAML file of a "
            f"task with files of its own, or one that reads --task-data: {', '.join(INCLUDED)}"
        ) from error
    groups = loaded["groups"].values()
    inner = {one.name for group in groups for one in group.get_all_groups()}
    grouped = {one.task_name for group in groups for one in group.get_all_tasks()}
    tasks = [task for task_name, task in loaded["tasks"].items() if task_name not in grouped]
    return [*(group for group in groups if group.name not in inner), *tasks]


@cache
def _manager(include_path: Path | None) -> TaskManager:
    """Knows the names of all of lm-eval's tasks, which takes it some seconds, and of those below a path."""
    return TaskManager(include_path=include_path)


def _built(name: str, task: Config | Members) -> Task | Group:
    if isinstance(task, Members):
        means = [AggMetricConfig(metric=metric, weight_by_size=False) for metric in task.metrics]
        group = Group(name=name, aggregate_metric_list=means)
        for member_name, member in task.tasks.items():
            group.add(_built(member_name, member))
        return group
    return ConfigurableTask(
        config={"task": name, "test_split": "test", "metadata": {"name": name, "version": 1}, **task}
    )


@contextlib.contextmanager
def _third_parties_quiet() -> Iterator[None]:
    """Nothing of lm-eval's and the hub's logs but errors, none of their bars, and nothing on stdout."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels, bars = [logger.level for logger in loggers], datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # around the making of prompts
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        lm_eval.api.task.tqdm = tqdm
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
