"""The `zoo` command: what it prints, and how it says no."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch

import zoo as installed
from zoo import create_model, from_hf, load, to_hf
from zoo.cli import LISTS, main
from zoo.listing import KINDS
from zoo.models.create import model_config
from zoo.objectives import create_objective
from zoo.tasks import create_task

RECIPE = """
task: {name: mqar, vocab_size: 64, seq_len: 16, n_pairs: 2}
model: {d_model: 16}
train: {steps: 4, batch_size: 4, eval_every: 2, eval_rows: 8, test_rows: 8}
variants:
  convolution: {model.pattern: short_conv mlp}
  attention: {model.pattern: mha mlp}
"""


@pytest.fixture
def zoo(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(RECIPE)
    Path("one.yaml").write_text(RECIPE.split("variants")[0].replace("d_model: 16", "d_model: 16, pattern: short_conv"))
    threads = torch.get_num_threads()

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        torch.set_num_threads(threads)
        return (ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Checkpoint folders: of a model of bytes, of a wider one, and one with a tokenizer that cannot be read."""
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    for name, options in {"llama": {}, "wide": {"vocab_size": 900}, "damaged": {}}.items():
        to_hf(create_model("llama3-tiny", **options), root / name)
    (root / "damaged/tokenizer.json").write_text("{")
    return root


@pytest.fixture
def published(zoo, folders):
    """Those folders, in the one that the command runs in."""
    shutil.copytree(folders, ".", dirs_exist_ok=True)
    return folders


@pytest.mark.parametrize("what", ["mixers", "models", "tasks", "objectives", "recipes"])
def test_list(zoo, what):
    status, out, err = zoo("list", what)
    assert (status, err) == (0, "")
    as_json = json.loads(zoo("list", what, "--json")[1])
    assert [line.split()[0] for line in out.splitlines()] == [entry["name"] for entry in as_json]
    assert all(entry["about"] for entry in as_json)
    assert max(len(line) for line in out.splitlines()) < (80 if what == "models" else 160)
    assert len(json.loads(zoo("list", what, as_json[0]["name"], "--json")[1])) == 1


def test_options_are_listed_with_type_default_and_meaning(zoo):
    assert zoo("list", "options", "train.lr")[1] == "train.lr  (float; 0.003) peak learning rate\n"
    (entry,) = json.loads(zoo("list", "options", "sweep.retries", "--json")[1])
    assert (entry["name"], entry["type"], entry["default"]) == ("sweep.retries", "int", "0")
    lines = zoo("list", "options")[1].splitlines()
    assert len(lines) == len(json.loads(zoo("list", "options", "--json")[1])) > 90


def test_models_are_listed_by_their_sizes(zoo):
    out = zoo("list", "models", "falcon_h1-*")[1].splitlines()
    entries = json.loads(zoo("list", "models", "falcon_h1-*", "--json")[1])
    for line, entry in zip(out, entries, strict=True):
        config = model_config(entry["name"])
        layers = sum(mixer.kind == "sequence" for mixer in on_meta(config).mixers())
        assert line.split(maxsplit=1) == [entry["name"], f"d_model {config.d_model}, {layers} sequence mixers"]
        assert (entry["d_model"], entry["sequence_mixers"]) == (config.d_model, layers)
        assert entry["pattern"] == config.pattern


def on_meta(config):
    with torch.device("meta"):
        return create_model(config)


def test_show(zoo):
    status, out, _ = zoo("show", "mqar", "vocab_size=64", "seq_len=16", "n_pairs=2")
    assert status == 0
    assert out.strip()
    assert "right too" not in out
    out = zoo("show", "n_queens", "size=8")[1]
    assert "The targets are the solution from which the given queens were taken. Other answers are right too" in out
    assert zoo("show", "small.yaml", "task.n_pairs=1")[0] == 0
    assert zoo("show", "sudoku-4x4", "--row", "3", "--split", "test")[0] == 0
    assert zoo("show", "mqar", "--picture", "row.png")[:2] == (0, "row.png\n")
    assert Path("row.png").read_bytes().startswith(b"\x89PNG")


def test_show_a_run(zoo):
    """Its model solves an example; by another objective's options, and several runs beside each other."""
    puzzle = ["task={name: sudoku, size: 4}", "model={pattern: token_mlp(length=16), d_model: 16, causal: false}"]
    assert zoo("train", "one.yaml", *puzzle, "objective=masked_diffusion", "out=runs/puzzle", "--quiet")[0] == 0
    status, out, err = zoo("show", "runs/puzzle", "--row", "1", "--which", "last")
    assert (status, err) == (0, "")
    assert "validation example 1" in out
    assert "pass 2" in out
    few = zoo("show", "runs/puzzle", "objective.steps=1", "--split", "test")[1]
    assert "pass 1" in few
    assert "pass 2" not in few
    assert zoo("show", "runs", "--picture", "runs.gif")[:2] == (0, "runs.gif\n")
    assert Path("runs.gif").read_bytes().startswith(b"GIF8")


def test_train_eval_compare(zoo):
    status, out, err = zoo("train", "one.yaml", "train.lr=1e-3", "--quiet")
    assert (status, err) == (0, "")
    assert out.startswith("runs/one: finished at step 4")
    status, out, _ = zoo("eval", "runs/one", "task.n_pairs=1", "--split", "test", "--json")
    assert status == 0
    assert json.loads(out)["n"] == 8
    assert "accuracy: " in zoo("eval", "runs/one")[1]
    status, out, _ = zoo("compare", "runs", "--report", "report.html")
    assert status == 0
    assert "one" in out
    assert Path("report.html").stat().st_size > 1000
    assert json.loads(zoo("compare", "runs/one", "--json")[1])
    damaged = Path("runs/damaged")
    damaged.mkdir()
    (damaged / "config.yaml").write_text("task: [")
    status, out, err = zoo("report", "--out", "all.html", "--no-answers")
    assert (status, out) == (0, "all.html (1 run)\n")
    assert err.startswith("Left out: runs/damaged/config.yaml is damaged")
    assert err.count("\n") == 1


def test_every_variant_is_trained_in_a_process_of_its_own(zoo, monkeypatch):
    """One that fails fails the command, and keeps none of the others from being trained.

    Without the pipe by which a process ends with the command: `test_a_child_does_not_outlive_its_parent` has it.
    """

    def start(command, pass_fds):
        return forked.start([command[0], *command[2:4], "-1", *command[5:]])

    monkeypatch.setattr("zoo.training.launch.subprocess", SimpleNamespace(Popen=start))
    blocked = Path("runs/both/convolution/notes.txt")
    blocked.parent.mkdir(parents=True)
    blocked.write_text("mine")
    status, out, _ = zoo("train", "small.yaml", "out=runs/both", "train.threads=1", "--quiet")
    assert status == 2
    assert "zoo compare runs/both" in out
    assert sorted(p.name for p in blocked.parent.iterdir()) == [".lock", "notes.txt"]
    result = json.loads(Path("runs/both/attention/result.json").read_text())
    assert (result["name"], result["status"]) == ("attention", "finished")
    blocked.unlink()
    assert zoo("train", "small.yaml", "out=runs/both", "--variant", "convolution", "train.threads=1")[0] == 0


def test_generate_answers_an_example_of_the_runs_task(zoo):
    assert zoo("train", "one.yaml", "train.threads=1", "--quiet")[0] == 0
    status, drawn, err = zoo("generate", "runs/one", "--example", "3")
    assert (status, err) == (0, "")
    data = json.loads(zoo("generate", "runs/one", "--example", "3", "--json")[1])
    task = create_task("mqar", vocab_size=64, seq_len=16, n_pairs=2)
    batch = task.sample(1, split="validation", seed=0, start=3)
    predictions = create_objective("next_token", task).predict(load("runs/one"), batch)
    assert drawn == task.render(batch, 0, predictions) + "\n"
    assert (data["inputs"], data["predictions"]) == (batch.inputs[0].tolist(), predictions[0].tolist())
    assert data["accuracy"] == task.score(batch, predictions)["accuracy"]
    test = json.loads(zoo("generate", "runs/one", "--example", "3", "--split", "test", "--json")[1])
    assert test["inputs"] != data["inputs"]
    said = zoo("generate", "runs/one", "--tokens", "1 2 3", "-n", "4")[1]
    assert said.split() == [str(t) for t in load("runs/one").generate([[1, 2, 3]], 4)[0][3:].tolist()]
    (step,) = Path("runs/one/checkpoints").glob("step_4")
    assert zoo("generate", str(step), "--tokens", "1 2 3", "-n", "4")[0] == 0
    status, _, err = zoo("generate", str(step), "--tokens", "1 2 3", "--which", "last")
    assert status == 2
    assert "--which=last chooses from a run" in err


def test_generate_continues_token_ids(zoo, published, monkeypatch):
    model = from_hf("llama")
    prompts, options = [[5, 6, 7], [9]], {"temperature": 1.2, "top_k": 50, "top_p": 0.95, "min_p": 0.001}
    rows = model.generate(prompts, 12, generator=torch.Generator().manual_seed(7), **options)
    new = [row[len(p) :].tolist() for row, p in zip(rows, prompts, strict=True)]
    given = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    command = ["generate", "llama", "-n", "12", "--seed", "7", "--stop", "none", *given]
    status, out, err = zoo(*command, "--tokens", "5 6 7", "--tokens", "9", "--prefill-chunk", "2")
    assert (status, err) == (0, "")
    assert out == "".join(f"{i}: {' '.join(map(str, row))}\n" for i, row in enumerate(new))
    for more in ([], ["--no-stream"]):
        assert zoo(*command, "--tokens", "5,6,7", *more)[1] == " ".join(map(str, new[0])) + "\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"5 6\n7\n")))
    assert zoo(*command, "--prompt-file", "-")[1] == " ".join(map(str, new[0])) + "\n"
    stop = new[0][2]
    command[command.index("none")] = str(stop)
    told = json.loads(zoo(*command, "--tokens", "5 6 7", "--json")[1])
    ended = new[0][: new[0].index(stop) + 1]
    assert told == {"model": "llama", "rows": [{"prompt": [5, 6, 7], "tokens": ended, "ended": "stop"}]}


def test_generate_ends_where_the_checkpoint_says(zoo, published):
    first = from_hf("llama").generate([[1, 2]], 8)[0][2:].tolist()
    Path("llama/generation_config.json").write_text(json.dumps({"eos_token_id": [first[3], 10**6]}))
    command = ["generate", "llama", "--tokens", "1 2", "-n", "8"]
    assert zoo(*command)[1].split() == [str(t) for t in first[: first.index(first[3]) + 1]]
    assert zoo(*command, "--stop", "none")[1].split() == [str(t) for t in first]
    Path("llama/generation_config.json").unlink()
    Path("llama/generation_config.json").mkdir()
    assert zoo(*command)[::2] == (2, "zoo: llama/generation_config.json cannot be read: it is no file but a folder.\n")


def test_generate_reads_and_writes_bytes(zoo, published):
    text = "né\n"
    Path("prompt.txt").write_text(text + "\n")
    model = from_hf("llama")
    options = ["-n", "40", "--temperature", "0.7", "--stop", "none", "--bytes"]
    row = model.generate([list(text.encode())], 40, temperature=0.7, generator=torch.Generator().manual_seed(0))[
        0
    ].tolist()
    said = bytes(row[len(text.encode()) :])
    told = json.loads(zoo("generate", "llama", "--prompt", text, *options, "--json")[1])["rows"][0]
    assert bytes(told["tokens"]) == said
    streamed = zoo("generate", "llama", "--prompt-file", "prompt.txt", *options)[1]
    whole = zoo("generate", "llama", "--prompt-file", "prompt.txt", *options, "--no-stream")[1]
    assert any(b < 32 and b not in b"\n\t" for b in said)
    assert streamed == whole
    assert all(c.isprintable() or c in "\n\t" for c in streamed)
    assert streamed == escaped(told["text"]) + "\n"


def test_generate_reads_and_writes_text_by_the_folders_tokenizer(zoo, published):
    tokenizer = byte_tokenizer(["hello", " ", "world", "漢", "字", "é"])
    tokenizer.save("llama/tokenizer.json")
    prompt = tokenizer.encode("hello 漢").ids
    new = from_hf("llama").generate([prompt], 30)[0].tolist()[len(prompt) :]
    command = ["generate", "llama", "-n", "30", "--stop", "none"]
    told = json.loads(zoo(*command, "--prompt", "hello 漢", "--json")[1])["rows"][0]
    assert (told["prompt"], told["tokens"]) == (prompt, new)
    assert zoo(*command, "--prompt", "hello 漢")[1] == escaped(told["text"]) + "\n"
    assert zoo(*command, "--tokens", " ".join(map(str, prompt)))[1].split() == [str(t) for t in new]


@pytest.mark.parametrize("text", ["hello wörld 漢字 é", "漢" * 40, "\ufffd", "naïve 🙂🙂 x"])
def test_streamed_characters_are_whole(text):
    from zoo.training.generating import BYTES, Continuation, Writing

    tokenizer = byte_tokenizer(["hello", " ", "é"])
    by_tokenizer = Writing(lambda text: tokenizer.encode(text).ids, lambda ids: tokenizer.decode(list(ids)), True)
    for writing in (BYTES, by_tokenizer):
        ids = writing.encode("é: " + text)
        known = len(writing.encode("é: "))
        row = Continuation(ids[:known], writing)
        pieces = [row.add(token) for token in ids[known:]]
        assert "".join(pieces) + row.end() == row.text == text
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
    cut = BYTES.encode("a漢")[:-1]
    row = Continuation([65], BYTES)
    assert "".join(row.add(token) for token in cut) == "a"
    assert row.end() == "\ufffd"


def escaped(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def byte_tokenizer(words: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def test_doctor(zoo, monkeypatch):
    from zoo.training import doctor

    monkeypatch.setattr(doctor, "SIZES", (64,))
    status, out, _ = zoo("doctor")
    assert status == 0
    assert {"python", "torch", "cpu", "device", "fla", "compiler"} <= {line.split()[0] for line in out.splitlines()}
    assert "delta_rule chunked 32 to width 64, then 64" in out
    assert "dplr with K V up to 16384" in out or "none without kernels" in out
    facts = json.loads(zoo("doctor", "--json")[1])
    assert facts["matmul_gflops"]["cpu float32"]["64"] > 0
    assert all(p["available"] or p["why"] for p in facts["packages"].values())


WRONG = [
    (["shw"], "No such command 'shw'"),
    (["list"], "Missing argument"),
    (["list", "mixer"], "Unknown list 'mixer'. Did you mean 'mixers'?"),
    (["list", "mixers", "--jsn"], "--jsn"),
    (["show", "mqra"], "Unknown task 'mqra'. Did you mean 'mqar'?"),
    (["show", "mqar", "n_pairs"], "'n_pairs' is not an override: write key=value"),
    (["show", "mqar", "n_pairs=two"], "n_pairs"),
    (["show", "mqar", "--split", "tets"], "Unknown split 'tets'. Did you mean 'test'?"),
    (["show", "mqar", "--row", "-1"], "--row"),
    (["show", "mqar", "--row", str(2**80)], "--row"),
    (["show", "mqar", "--picture", "row.xyz"], "no ending that names a picture format"),
    (["show", "."], "holds no run"),
    (["show", "mqar", "--which", "last"], "mqar is no run folder"),
    (["train"], "Missing argument"),
    (["train", "mqar-dmo"], "Unknown recipe 'mqar-dmo'. Did you mean 'mqar-demo'?"),
    (["train", "missing.yaml"], "neither a recipe file nor a run folder"),
    (["train", "small.yaml", "--variant", "atention"], "Unknown variant 'atention'. Did you mean 'attention'?"),
    (["train", "one.yaml", "trian.lr=1"], "Unknown option of experiment 'trian'. Did you mean 'train'?"),
    (["train", "one.yaml", "train.stepps=1"], "Unknown option of train 'stepps'. Did you mean 'steps'?"),
    (["train", "one.yaml", "train.steps=many"], "train: steps='many' is not allowed"),
    (["train", "one.yaml", "model.pattern=mhaa"], "Unknown mixer 'mhaa'. Did you mean 'mha'?"),
    (["train", "one.yaml", "model.pattern=mha(heads=2)"], "Unknown option of mha 'heads'"),
    (["train", "one.yaml", "model.pattern=mha(n_heads=3)"], "3"),
    (["train", "one.yaml", "model.d_model=17"], "d_model=17 is not allowed"),
    (["train", "one.yaml", "model.vocab_size=9"], "model.vocab_size=9 is too small"),
    (["train", "one.yaml", "task.seq_len=6"], "seq_len"),
    (["train", "one.yaml", "task=sudku"], "Unknown task 'sudku'. Did you mean 'sudoku'?"),
    (["train", "one.yaml", "objective=next"], "Unknown objective 'next'"),
    (["train", "one.yaml", "train.device=cuda:7"], "device='cuda:7' is not allowed"),
    (["train", "one.yaml", "--resume"], "no checkpoint to resume from"),
    (["train", "one.yaml", "--resume", "--fresh"], "give one of them"),
    (["train", "small.yaml", "model.pattern=mha"], "makes all 2 variants the same model: name one by --variant."),
    (["train", "small.yaml", "model.pattern=mhaa", "--variant", "attention"], "Unknown mixer 'mhaa'"),
    (["eval", "runs/none"], "There is no run folder 'runs/none'"),
    (["eval", "."], "holds no checkpoint"),
    (["compare", "runs/none"], "runs/none"),
    (["compare", "runs/none", "--report", "."], "'.' is a folder: expected the name of a file"),
    (
        ["compare", "runs/none", "--report", "page.pdf"],
        "'page.pdf' is not allowed: a report is a page, whose name ends",
    ),
    (["report", "runs/none", "--out", "page"], "'page' is not allowed: a report is a page, whose name ends in .html"),
    (["generate", "runs/none", "--tokens", "1"], "There is no run folder 'runs/none'"),
    (["generate", ".", "--tokens", "1"], "neither a run folder, with a config.yaml, nor a checkpoint folder"),
    (["generate", "llama"], "Give a prompt in one way: --prompt, --tokens, --prompt-file or --example."),
    (["generate", "llama", "--tokens", "1", "--bytes", "--prompt", "a"], "Give a prompt in one way"),
    (["generate", "llama", "--tokens", "1", "--bytes"], "--bytes is for text: --tokens cannot go with it."),
    (["generate", "llama", "--tokens", "1", "--which", "last"], "--which=last chooses from a run: llama is"),
    (["generate", "llama", "--tokens", "1 x"], "'1 x' is not a list of token ids"),
    (["generate", "llama", "--tokens", "1 256"], "Token 256 is not one of the vocab_size=256 ids"),
    (["generate", "llama", "--tokens", ""], "at least one prompt, each of at least one token"),
    (["generate", "llama", "--prompt", "text"], "llama holds no tokenizer.json: give token ids with --tokens"),
    (
        ["generate", "llama", "--prompt-file", "none.txt"],
        "--prompt-file none.txt cannot be read: there is no",
    ),
    (["generate", "llama", "--tokens", "1", "--top-k", "0", "--temperature", "1"], "top_k=0 is not allowed"),
    (["generate", "llama", "--tokens", "1", "--top-p", "0.5"], "top_p=0.5 chooses among samples"),
    (["generate", "llama", "--tokens", "1", "-n", "-1"], "max_new_tokens=-1 is not allowed"),
    (["generate", "llama", "--tokens", "1", "--stop", "end"], "'end' is not a list of token ids"),
    (["generate", "llama", "--tokens", "1", "--prefill-chunk", "0"], "prefill_chunk=0 is not allowed"),
    (["generate", "llama", "--tokens", "1", "--device", "tpu"], "device='tpu' is not available"),
    (["generate", "llama", "--example", "1"], "llama is a checkpoint folder, which has no task"),
    (["generate", "llama", "--example", "1", "--top-k", "2", "--stop", "3"], "--stop, --top-k cannot go with it"),
    (["generate", "wide", "--bytes", "--prompt", "a"], "--bytes is for models of 256 bytes and a few special tokens"),
    (["generate", "damaged", "--prompt", "a"], "tokenizer.json cannot be read"),
]


@pytest.mark.parametrize(("arguments", "told"), WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_wrong_use_is_one_line_and_status_2(zoo, published, arguments, told):
    status, out, err = zoo(*arguments)
    assert (status, out) == (2, "")
    assert told in err
    assert err.startswith("zoo: ")
    assert err.count("\n") == 1
    assert not Path("runs").exists()


def test_a_damaged_run_is_one_line_and_status_2(zoo):
    zoo("train", "one.yaml", "--quiet", "train.threads=1")
    for path in Path("runs/one/checkpoints").glob("*/weights.safetensors"):
        path.write_bytes(b"garbage")
    status, out, err = zoo("eval", "runs/one")
    assert (status, out) == (2, "")
    assert "weights.safetensors is truncated, 7 of" in err
    status, _, err = zoo("train", "one.yaml", "train.lr=0.5", "train.threads=1")
    assert status == 2
    assert "different train.lr (0.003 there, 0.5 now)" in err


def test_not_finite_is_one_line_and_status_1(zoo):
    status, out, err = zoo("train", "one.yaml", "train.lr=1e30", "train.clip=null", "--quiet", "train.threads=1")
    assert (status, out) == (1, "")
    assert err.startswith("zoo: ")
    assert err.count("\n") == 1
    assert "lower train.lr" in err


def test_too_large_for_memory_is_one_line_and_status_1(zoo, monkeypatch):
    def read(*_):
        raise MemoryError

    monkeypatch.setattr("zoo.training.recipes.read_task", read)
    status, out, err = zoo("show", "niah")
    assert (status, out, err) == (1, "", "zoo: Not enough memory: choose smaller sizes\n")


def test_help(zoo):
    status, out, _ = zoo()
    assert status == 0
    for command in ("list", "show", "train", "eval", "generate", "compare", "report", "doctor"):
        assert command in out
        assert zoo(command, "--help")[0] == 0


NOT_INSTALLED = {
    "numba": (
        ["show", "sudoku", "size=4"],
        1,
        "'numba' is missing; pip install sequence-zoo brings it.",
    ),
    "torchdiffeq": (
        ["train", "one.yaml", "model.pattern=neural_ode(adjoint=True)"],
        2,
        'pip install "sequence-zoo[ode]"',
    ),
    "tokenizers": (["generate", "damaged", "--prompt", "a"], 2, 'pip install "sequence-zoo[text]"'),
}


@pytest.mark.parametrize("package", NOT_INSTALLED)
def test_what_is_not_installed_is_named_in_one_line(zoo, monkeypatch, published, package):
    command, expected, told = NOT_INSTALLED[package]
    monkeypatch.setitem(sys.modules, package, None)
    for name in [name for name in sys.modules if name.startswith("zoo.tasks.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(sys.modules["zoo.tasks.kernels"], name.rpartition(".")[2], raising=False)
    status, out, err = zoo(*command)
    assert (status, out, err.count("\n")) == (expected, "", 1)
    assert told in err


LIGHT = {
    "help": ["--help"],
    "version": ["--version"],
    "help of a command": ["train", "--help"],
    "completion": ["train", "mqar-"],
    "completion of a sweep": ["sweep", "mqar-s"],
}
HEAVY = {"torch", "numpy", "pydantic", "yaml", "rich", "matplotlib"}


@pytest.mark.parametrize("asked", LIGHT)
def test_help_version_and_completion_import_nothing_heavy(asked):
    """A fresh process, and modules are counted, not seconds."""
    words = LIGHT[asked]
    code = (
        "import sys; from zoo.cli import main\ntry: main(sys.argv[1:])\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    environment = dict(os.environ)
    if asked.startswith("completion"):
        typed = {
            "COMP_WORDS": " ".join(["zoo", *words]),
            "COMP_CWORD": str(len(words)),
            "_ZOO_COMPLETE": "complete_bash",
        }
        environment, words = environment | typed, []
        code = "import sys; sys.argv[0] = 'zoo'\n" + code
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = {"version": f"sequence-zoo {installed.__version__}\n", "completion": "mqar-demo\nmqar-hybrid\n"}
    expected["completion of a sweep"] = "mqar-sweep\n"
    assert done.stdout == expected.get(asked, done.stdout)
    assert done.stdout
    loaded = set(done.stderr.split())
    assert "zoo.cli" in loaded
    own = {"pydantic"} if words != LIGHT[asked] or "train" in words else set()  # typer's, for a command's parameters
    assert loaded & HEAVY <= own


def test_lists_that_are_completed_are_those_that_there_are():
    assert LISTS == KINDS


def test_as_a_module_outside_the_checkout(tmp_path):
    """A real process: no traceback, and a `tasks.py` of one's own in the way of nothing."""
    root = str(Path(__file__).resolve().parents[1])
    code = f"import sys; sys.path.append({root!r}); sys.argv = ['zoo', 'train', 'nothing']; import runpy; "
    code += "runpy.run_module('zoo', run_name='__main__')"
    done = forked.run([sys.executable, "-c", code], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("zoo: Unknown recipe 'nothing'.")
    assert done.stderr.count("\n") == 1
