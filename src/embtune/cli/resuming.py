"""What going on with a run means where its options are not those that it began with."""

from collections.abc import Iterator, Mapping
from typing import Any

from embtune.errors import ArgumentError

_SHAPES = ("lora_r", "lora_targets", "lora_args", "full_finetuning")
_LENGTH = ("epochs", "max_steps")
_EFFECTS = {
    **dict.fromkeys(_LENGTH, "the learning rate takes the course of a run of the new length from here on"),
    "learning_rate": "without effect, because the saved optimizer and its schedule go on; for another one start a new "
    "run, which may begin with the trained model",
    "seed": "rows come in another order, so of this epoch some are seen again and others are not",
    "batch_sampler": "rows come in another order, so of this epoch some are seen again and others are not",
    "weights": "an epoch is made up differently, so of this one some rows are seen again and others are not",
}


def check_fits(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise where the weights of a checkpoint would not fit the model.

    Raises:
        ArgumentError: an option by which weights are trained, or how many, is not as when the run began.
    """
    for name in _SHAPES:
        if before.get(name, now[name]) != now[name]:
            raise ArgumentError(
                f"resume: {name} {_shown(before[name])} -> {_shown(now[name])}: what the checkpoint holds would not "
                f"fit. Leave {name} out, or start a new run in another folder."
            )


def asks_for_more(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether options ask for another number of steps than those a run began with."""
    return any(before.get(name) != now[name] for name in _LENGTH)


def about_changes(before: Mapping[str, Any], now: Mapping[str, Any], names: list[str], step: int) -> Iterator[str]:
    """A line for each option that changed: old value, new value, and what follows from it.

    Args:
        before: the options that the run began with.
        names: those that differ in `now`.
        step: of the checkpoint from which the run goes on.
    """
    if _rows(before) != _rows(now):
        yield _about_rows(_rows(before), _rows(now), step)
    for name in names:
        if name != "batch_size":
            effect = f": {_EFFECTS[name]}" if name in _EFFECTS else ""
            yield f"{name} {_shown(before.get(name))} -> {_shown(now[name])}{effect}."


def _about_rows(old: int, new: int, step: int) -> str:
    """The Trainer counts batches: it skips as many as were taken, of whatever size they are now."""
    difference = abs(new - old) * step
    what = "rows that were not seen yet are skipped" if new > old else "rows are seen a second time"
    return (
        f"rows in a step {old:,} -> {new:,}: the run goes on as if its {step:,} steps had been of the new size, so "
        f"about {difference:,} {what} in this epoch."
    )


def _rows(options: Mapping[str, Any]) -> int:
    accumulated = (options.get("training_args") or {}).get("gradient_accumulation_steps", 1)
    return int(options.get("batch_size") or 1) * int(accumulated)


def _shown(value: Any) -> str:
    return "–" if value is None or value == [] or value == {} else str(value)
