"""The files of a run folder: what each is called, and how it is read by whoever reads it.

config.yaml        every option, defaults spelt out
metrics.jsonl      a line per training report and evaluation
result.json        what `zoo compare` reads
init.json          of a run that started from other weights: which it kept, and which were new
imports.json       the files of the user's own that it needs: see `zoo.training.imports`
solving.json       an example while it is solved, where that takes steps: see `zoo.training.solving`
tracking.json      the ids under which experiment trackers know the run
events.out.*       the same records for TensorBoard, where that is installed: a file for each start
checkpoints/       see `zoo.training.checkpoint`
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from zoo.core import yaml_text
from zoo.core.errors import UsageError, quoted
from zoo.core.readers import read_text, shown

CONFIG, METRICS, RESULT, SOLVING = "config.yaml", "metrics.jsonl", "result.json", "solving.json"
INIT = "init.json"
IMPORTED, TRACKING = "imports.json", "tracking.json"
CHECKPOINTS, EVENTS, LOCK = "checkpoints", "events.out.tfevents.", ".lock"
"""Names of files and folders; `EVENTS` is how the names of event files begin."""
SECTIONS = ("task", "model", "objective", "train")
"""Of a config."""


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, by what is in it."""
    return (folder / CONFIG).is_file()


def run_of(checkpoint: Path) -> Path:
    """The run folder of a checkpoint."""
    return checkpoint.parents[1] if len(checkpoint.parents) > 1 else checkpoint.absolute().parent.parent


def no_run(path: Path) -> str:
    """What to say of a folder that is no run's: which folders in it are."""
    names = sorted(p.name for p in path.iterdir() if is_run(p)) if os.access(path, os.R_OK) else []
    if not names:
        return f"{path} is no run folder: it has no {CONFIG}."
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f"{path} is no run folder, but holds some: {', '.join(str(path / n) for n in names[:3])}{more}."


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a run folder: at least its task or its model, whatever version wrote it.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    path = folder / CONFIG
    if not path.exists():
        raise UsageError(no_run(folder) if folder.is_dir() else f"There is no run folder {str(folder)!r}.")
    try:
        config = yaml_text.load(read_text(path, most=4 * yaml_text.MAX_LENGTH), shown(path))
    except yaml.YAMLError as error:
        raise UsageError(f"{shown(path)} is damaged: it is not valid YAML: {yaml_text.describe(error)}.") from None
    except UsageError as error:
        raise UsageError(f"{shown(path)} is damaged: {error}") from None
    if not isinstance(config, dict) or not config.keys() & {"task", "model"}:
        raise UsageError(f"{shown(path)} is damaged, or not a run's: it should be a mapping of {', '.join(SECTIONS)}.")
    return as_written_now(config)


def as_written_now(sections: dict[str, Any]) -> dict[str, Any]:
    """The sections of a config as this version writes them.

    Of a plain residual no number of streams, which had no effect; `model.recursion.recompute` is `train.recompute`.
    """
    model, train = sections.get("model"), sections.get("train")
    if not isinstance(model, Mapping):
        return sections
    if model.get("residual") == "plain":
        model = {k: v for k, v in model.items() if k not in ("residual_streams", "residual_dynamic")}
    recursion = model.get("recursion")
    if isinstance(recursion, Mapping) and "recompute" in recursion:
        if isinstance(train, Mapping):
            sections = {**sections, "train": {"recompute": recursion["recompute"], **train}}
        model = {**model, "recursion": {k: v for k, v in recursion.items() if k != "recompute"}}
    return {**sections, "model": model}


def read_whole_config(folder: Path) -> dict[str, Any]:
    """As `read_config`, with all sections that a model and its task are made from.

    Raises:
        UsageError: a section is missing.
    """
    config = read_config(folder)
    if missing := [section for section in SECTIONS if section not in config]:
        raise UsageError(f"{shown(folder / CONFIG)} is damaged, or not a run's: it lacks {', '.join(missing)}.")
    return config


def read_result(folder: Path) -> dict[str, Any]:
    """What result.json of a run folder holds, empty where there is none yet.

    Raises:
        UsageError: it cannot be read, or is no JSON object.
    """
    path = folder / RESULT
    if not path.exists():
        return {}
    try:
        result = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        hint = f"Delete it to compare what {METRICS} holds, or resume the run to write it again."
        where = f" at line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UsageError(f"{shown(path)} is damaged{where}: {_why(error)}. {hint}") from None
    if not isinstance(result, dict):
        told = f"expected one JSON object, not a {type(result).__name__}"
        raise UsageError(f"{shown(path)} is not a run's result: {told}.")
    return result


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of a run folder, none where there is no such file.

    A last line without its line end was being written when the run was killed, or is right now: no damage.

    Raises:
        UsageError: a line is damaged.
    """
    path = folder / METRICS
    if not path.exists():
        return []
    *lines, last = read_text(path).split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            record = parse_record(line)
            if isinstance(record, str):
                raise UsageError(f"{shown(path)} is damaged at line {number}: {record}.")
            records.append(record)
    record = parse_record(last)
    return records if isinstance(record, str) else [*records, record]


def parse_record(line: str | bytes) -> dict[str, Any] | str:
    """A line of metrics.jsonl, or what is wrong with it."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _why(error)
    return record if isinstance(record, dict) else f"expected one JSON object, not {quoted(record, 40)}"


def _why(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "nested too deeply" if isinstance(error, RecursionError) else "a number or text that cannot be read"


def dotted(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of a nested mapping, as overrides have them, and their values; an empty mapping is a value."""
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differing(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two configs."""
    keys: list[str] = []
    for key in [*old, *(k for k in new if k not in old)]:
        path = f"{prefix}{key}"
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys += differing(a, b, path + ".")
        elif a != b:
            keys.append(path)
    return keys


def changes(old: Any, new: Any, keys: Iterable[str], then: str) -> str:
    """The values of dotted keys in two configs, the old ones being those of `then`, for an error."""
    return ", ".join(f"{k} ({quoted(at_key(old, k))} {then}, {quoted(at_key(new, k))} now)" for k in keys)


def at_key(data: Any, key: str) -> Any:
    """The value of a dotted key in a config, None where it has none."""
    for part in key.split("."):
        data = data.get(part) if isinstance(data, Mapping) else None
    return data
