"""The page about file formats names what the files of a real run and a real sweep hold, and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import polars
import pytest
import safetensors.torch
import torch
import yaml

import zoo

PAGE = Path(__file__).parents[1] / "docs" / "files.md"
SMALL = {
    "name": "small",
    "task": {"name": "mqar", "vocab_size": 32, "seq_len": 16, "n_pairs": 2},
    "model": {"pattern": "short_conv {mixer}", "d_model": 16},
    "words": {"mixer": "swiglu"},
    "train": {"steps": 2, "eval_every": 2, "log_every": 1, "batch_size": 2, "eval_rows": 4, "test_rows": 4, "ema": 0.9},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a run and a sweep."""
    folder = tmp_path_factory.mktemp("made")
    zoo.train({**SMALL, "out": str(folder / "run")}, quiet=True)
    space = {"words.mixer": ["swiglu", "mlp"]}
    choose = {"key": "train.lr", "seeds": [100]}
    sweep = {"experiment": SMALL, "space": {**space, "train.lr": [1e-3, 1e-2]}, "seeds": [0, 1], "choose": choose}
    zoo.sweep(sweep, out=folder / "sweep", quiet=True, ray=False)
    return folder


def section(title: str) -> str:
    return PAGE.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def named(text: str) -> set[str]:
    """The names in the first column of all tables."""
    return {name for row in re.findall(r"^\| (`.+?) \|", text, re.M) for name in re.findall(r"`([^`]+)`", row)}


def test_the_files_of_a_run(made):
    there = {path.name for path in (made / "run").iterdir()}
    said = {
        name.split("/")[0].replace("events.out.tfevents.*", "events") for name in named(section("The folder of a run"))
    }
    there = {"events" if name.startswith("events") else name for name in there}
    assert there <= said
    assert said - there <= {"imports.json", "init.json", "solving.json", "tracking.json", "events"}
    assert named(section("Checkpoints")) == {path.name for path in (made / "run/checkpoints/step_2").iterdir()}


def test_the_config(made):
    config = yaml.safe_load((made / "run/config.yaml").read_text())
    assert [f"`{key}`" in section("`config.yaml`") for key in config] == [True] * 5
    again = zoo.train(str(made / "run/config.yaml"), {"out": str(made / "again")}, quiet=True)
    assert again.data["test"] == json.loads((made / "run/result.json").read_text())["test"]


def test_the_records(made):
    lines = [json.loads(line) for line in (made / "run/metrics.jsonl").read_text().splitlines()]
    rows = re.findall(r"^\| (`.+?) \| (.+?) \|", section("`metrics.jsonl`"), re.M)
    for split in ("train", "validation", "test"):
        said = {
            name for names, where in rows if where == "all" or split in where for name in re.findall(r"`(\w+)`", names)
        }
        assert {key for line in lines if line["split"] == split for key in line} == said


def test_the_result(made):
    assert named(section("`result.json`")) == set(json.loads((made / "run/result.json").read_text()))


def test_a_run_that_starts_from_other_weights_and_is_extended(made):
    experiment = {**SMALL, "init": str(made / "run"), "out": str(made / "tuned")}
    zoo.train(experiment, quiet=True)
    result = zoo.train(made / "tuned", {"train.steps": 3}, quiet=True).data
    assert result.keys() == named(section("`result.json`")) | {"init", "extended"}
    assert json.loads((made / "tuned/init.json").read_text()).keys() == named(section("`init.json`"))
    assert all(f"`{key}`" in section("`result.json`") for key in ("init", "extended", *result["extended"][0])[:3])


def test_a_saved_model(made):
    folder = zoo.save(zoo.load(made / "run"), made / "saved")
    text = section("A saved model")
    data = json.loads((folder / "model.json").read_text())
    assert all(f"`{name}`" in text for name in (*data, *(path.name for path in folder.iterdir())))
    content = (folder / "weights.safetensors").read_bytes()
    assert data["weights"]["digest"] == hashlib.blake2b(content, digest_size=16).hexdigest()


def test_a_manifest_can_be_checked_without_the_package(made):
    folder = made / "run/checkpoints/step_2"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) <= set(re.findall(r"`(\w+)`", section("Checkpoints")))
    for name, file in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert (file["bytes"], file["digest"]) == (len(data), hashlib.blake2b(data, digest_size=16).hexdigest())
    rest = json.dumps({k: v for k, v in manifest.items() if k != "digest"}, sort_keys=True)
    assert manifest["digest"] == hashlib.blake2b(rest.encode(), digest_size=16).hexdigest()
    names = set(safetensors.torch.load_file(folder / "weights.safetensors"))
    assert names == set(zoo.load(made / "run").state_dict())
    assert torch.load(folder / "training.pt", weights_only=True)["position"]["step"] == 2


def test_the_files_of_a_sweep(made):
    said = named(section("The folder of a sweep"))
    there = {path.name for path in (made / "sweep").iterdir()} | {
        f"store/{path.name}" for path in (made / "sweep/store").iterdir()
    }
    assert there - {"store", "trials"} <= said
    assert (made / "sweep/trials/00000/result.json").exists()


@pytest.mark.parametrize("table", ["trials", "curves", "problems"])
def test_the_tables_of_a_sweep(made, table):
    text = section("The folder of a sweep")
    columns = set(polars.read_parquet(made / f"sweep/store/{table}.parquet").columns)
    if table == "curves":
        said = {"trial"} | named(section("`metrics.jsonl`"))
    else:
        said = named(
            text.partition(f"Columns of `{table}`")[2].partition("\n\n`curves`" if table == "trials" else "\n\n#")[0]
        )
    families = {name.split(".")[0] for name in said if "." in name}
    found = {name for name in columns if name.split(".")[0] not in families}
    of_series = {"mse", "trivial_mse"} if table == "problems" else set()  # this sweep is one of tokens
    assert found == {name for name in said if "." not in name} - of_series
    assert {name.split(".")[0] for name in columns if "." in name} == families
    if table == "trials":
        assert {"config.words.mixer", "set.train.lr", "config.variant"} - columns <= {"config.variant"}
