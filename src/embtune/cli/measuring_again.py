"""The command that measures a run's two models again, just as the run did."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from embtune.cli.tasks import EvaluationTask
from embtune.cli.train_config import TrainConfig

EVALUATE_DTYPE = "float32"
"""In which `embtune evaluate` holds weights unless told otherwise."""

# What a run gives its base, too, and `embtune evaluate` does not: the figures of the base then differ.
_GIVEN_TO_THE_BASE = ("prompts", "pooling_mode", "load_in_4bit", "load_in_8bit", "model_args")


def measure_again(
    config: TrainConfig, merged: str, tasks: Mapping[str, EvaluationTask], how: Mapping[str, Any]
) -> tuple[str, str]:
    """What for, and the command, of the run's first evaluation data.

    Args:
        merged: the folder of the trained model.
        tasks: what the run measured on, by name.
        how: `dtype` in which the run measured.
    """
    options = config.flat()
    without = [name for name in _GIVEN_TO_THE_BASE if options[name]]
    purpose = "Compare both again, as this run did"
    if without:
        purpose += f", but {shlex.quote(config.model)} without its {', '.join(without)}"
    elif how["dtype"] != EVALUATE_DTYPE:
        purpose += f" (merged weights are rounded to {how['dtype']}, so the last digits may differ)"
    words = ["embtune", "evaluate", config.model, merged, *_options(config, tasks, how)]
    return f"{purpose}:", shlex.join(words)


def _options(config: TrainConfig, tasks: Mapping[str, EvaluationTask], how: Mapping[str, Any]) -> Iterator[str]:
    more = config.more
    name, task = next(iter(tasks.items()))
    yield from ("--data", config.eval_data[name])
    columns = {column: role for column, role in config.eval_columns_of(name).items() if column != role}
    if columns:
        yield "--columns"
        yield from (f"{column}={role}" for column, role in config.eval_columns_of(name).items())
    kind = more.eval_tasks.get(name, "auto")
    depth = more.eval_k if task.kind == "retrieval" else None
    given = {
        "--split": more.eval_split,
        "--task": None if kind == "auto" else kind,
        "--train-data": more.eval_train_data.get(name),
        "--k": depth,
        "--max-seq-length": config.max_seq_length,
        "--dtype": None if how["dtype"] == EVALUATE_DTYPE else how["dtype"],
    }
    for flag, value in given.items():
        if value is not None:
            yield from (flag, str(value))
