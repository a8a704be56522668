"""Files in RULER's and BABILong's public forms."""

from __future__ import annotations

import csv
import json
import pickle

import pytest
import torch

from zoo import tasks
from zoo.tasks.protocol import IGNORE, SPLITS
from zoo.tasks.question_files import LABELS, contained, names_labels

PREFIX = " The special magic number for {} mentioned in the provided text is"


def needle(key, value, filler=3):
    hay = "The grass is green. The sky is blue. "
    text = f"{hay * filler}One of the special magic numbers for {key} is: {value}. {hay}What is it for {key}?"
    return {"index": 0, "input": text, "outputs": [value], "length": 99, "answer_prefix": PREFIX.format(key)}


def story(person, place):
    facts = f"He sat down. {person} went to the {place}. It was a dark and stormy night."
    return {"input": facts, "question": f"Where is {person}? ", "target": place}


RULER = [needle(f"red-{i}", str(1000 + i), i % 7) for i in range(60)]
BABILONG = [story(f"Person{i}", LABELS["qa1"][i % 6]) for i in range(60)]


def lines(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.fixture
def ruler(tmp_path):
    return lines(tmp_path / "niah.jsonl", RULER)


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "0k.json"
    path.write_text(json.dumps(BABILONG))
    return str(path)


def text(tokens):
    return bytes(t for t in tokens.tolist() if t < 256).decode()


@pytest.mark.parametrize("name", ["niah", "variable_tracking", "cwe", "fwe"])
def test_rows_are_prompts_and_answers_in_bytes(name, ruler):
    task = tasks.create_task(name, path=ruler, seq_len=600)
    assert task.vocab_size == 257
    prompts = {}
    for split in SPLITS:
        batch = task.sample(60, split=split, seed=0)
        for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
            scored = targets != IGNORE
            begin = int(scored.nonzero()[0]) + 1
            prompt, answer = text(inputs[:begin]), text(targets[scored])
            record = next(r for r in RULER if r["input"] + r["answer_prefix"] == prompt)
            assert answer == (" 1. " if name == "cwe" else " ") + record["outputs"][0]
            assert inputs[0] == 256
            assert targets[scored][-1] == 256
            assert torch.equal(inputs[begin:][: scored.sum() - 1], targets[scored][:-1]), "read back"
            prompts.setdefault(prompt, set()).add(split)
    assert len(prompts) == 60
    assert all(len(splits) == 1 for splits in prompts.values()), "a question is in one split"


def test_answers_of_several_references(tmp_path):
    record = {"input": "Which?", "outputs": ["AB", "CD"]}
    said = {"niah": " AB, CD", "variable_tracking": " AB CD", "cwe": " 1. AB 2. CD", "fwe": " AB, CD"}
    path = lines(tmp_path / "a.jsonl", [record])
    for name, answer in said.items():
        task = tasks.create_task(name, path=path, test_path=path)
        batch = task.sample(1, split="test", seed=0)
        assert text(batch.targets[0][batch.targets[0] != IGNORE]) == answer


def test_contained_is_the_share_of_references_in_whatever_case():
    assert contained("they are abc, XYZ.", ("ABC", "xyz")) == 1.0
    assert contained("they are abc", ("ABC", "xyz")) == 0.5
    assert contained("", ("a",)) == 0.0


@pytest.mark.parametrize(
    ("answer", "target", "question", "kind", "right"),
    [
        (" The Office.", "office", "Where is Mary?", "qa1", True),
        (" office or kitchen", "office", "Where is Mary?", "qa1", False),
        (" office. Not the kitchen.", "office", "Where is Mary?", "qa1", True),
        (" office <example> kitchen", "office", "Where is Mary?", "qa1", True),
        (" before the kitchen, the office", "office", "Where was it before the kitchen?", "qa3", True),
        (" milk and football", "football,milk", "What is Mary carrying?", "qa8", True),
        (" milk", "football,milk", "What is Mary carrying?", "qa8", False),
        (" s,w", "s,w", "How do you go?", "qa19", True),
        (" nowhere", "office", "Where is Mary?", "qa1", False),
    ],
)
def test_labels_are_read_as_published(answer, target, question, kind, right):
    assert names_labels(answer, target, question, LABELS[kind]) == right


def test_figures(ruler, stories):
    for name, path, figure in (("niah", ruler, "contained"), ("babilong", stories, "labels")):
        task = tasks.create_task(name, path=path, seq_len=600)
        batch = task.sample(8, split="train", seed=0)
        assert task.score(batch, batch.targets)[figure] == 1.0
        nonsense = torch.full_like(batch.targets, ord("q"))
        assert task.score(batch, nonsense)[figure] == 0.0
        early = batch.targets.clone()  # all of the answer, behind an end
        for row in early:
            scored = (row != IGNORE).nonzero()[:, 0]
            row[scored] = torch.cat([torch.tensor([256]), row[scored][:-1]])
        assert task.score(batch, early)[figure] == 0.0
        assert task.render(batch, 0, batch.targets).count(text(batch.targets[0][batch.targets[0] != IGNORE])) >= 1


def test_depth_of_the_needle(ruler):
    task = tasks.create_task("niah", path=ruler, seq_len=600)
    batch = task.sample(40, split="train", seed=0)
    for inputs, depth in zip(batch.inputs, batch.slices["depth"], strict=True):
        prompt = text(inputs)
        record = next(r for r in RULER if r["input"] in prompt)
        size = len(record["input"] + record["answer_prefix"])
        assert depth == int(10 * prompt.index(record["outputs"][0]) / size)


def test_a_tokenizer_of_ones_own(ruler, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["?", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator([r["input"] for r in RULER], trainer)
    file = str(tmp_path / "tokenizer.json")
    words.save(file)
    size = words.get_vocab_size()
    for end, last in ((None, size), ("</s>", 1)):
        task = tasks.create_task("niah", path=ruler, seq_len=200, tokenizer=file, end_token=end)
        assert task.vocab_size == size + (end is None)
        batch = task.sample(4, split="train", seed=0)
        scored = batch.targets[0] != IGNORE
        assert batch.targets[0][scored][-1] == last
        assert task.score(batch, batch.targets)["contained"] == 1.0
        answer = words.decode(batch.targets[0][scored][:-1].tolist())
        assert f"is: {answer.strip()}." in words.decode(batch.inputs[0].tolist())
        again = pickle.loads(pickle.dumps(task)).sample(4, split="train", seed=0)
        assert torch.equal(again.inputs, batch.inputs)
    with pytest.raises(tasks.UsageError, match="end_token='<eos>' is not in"):
        tasks.create_task("niah", path=ruler, seq_len=200, tokenizer=file, end_token="<eos>")
    with pytest.raises(tasks.UsageError, match=r"niah\.jsonl cannot be read") as error:
        tasks.create_task("niah", path=ruler, tokenizer=ruler)
    assert "\n" not in str(error.value)


def test_a_second_file_is_the_test_split(ruler, tmp_path):
    other = lines(tmp_path / "other.jsonl", [*RULER[:5], needle("blue", "77")])
    task = tasks.create_task("niah", path=ruler, test_path=other, seq_len=600)
    asked = [text(row) for row in task.sample(6, split="test", seed=0).inputs]
    assert all(r["input"] in a for r, a in zip([*RULER[:5], needle("blue", "77")], asked, strict=True))
    taught = [text(row) for s in ("train", "validation") for row in task.sample(100, split=s, seed=0).inputs]
    assert not any(r["input"] in t for r in RULER[:5] for t in taught)


def test_arrays_and_lines_are_read_alike(tmp_path, stories):
    spread = tmp_path / "spread.json"
    spread.write_text(json.dumps(BABILONG, indent=2))
    rows = [
        tasks.create_task("babilong", path=str(path)).sample(10, split="train", seed=0).inputs
        for path in (stories, spread, lines(tmp_path / "lines.jsonl", BABILONG))
    ]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


BABI = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Where is Daniel? \thallway\t4
1 Sandra went to the garden.
2 Where is Sandra?\tgarden\t1
"""


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_babi_s_own_files(tmp_path, ends):
    path = tmp_path / "qa1_single-supporting-fact_test.txt"
    path.write_text(BABI, newline=ends)
    task = tasks.create_task("babilong", path=str(path), test_path=str(path), seq_len=300)
    batch = task.sample(3, split="test", seed=0)
    prompts = [text(row) for row in batch.inputs]
    facts = "Mary moved to the bathroom. John went to the hallway."
    assert f"<context>\n{facts}\n</context>\n\nQuestion: Where is Mary?\nAnswer: bathroom" in prompts[0]
    assert f"{facts} Daniel went back to the hallway.\n</context>\n\nQuestion: Where is Daniel?" in prompts[1]
    assert "<context>\nSandra went to the garden.\n</context>" in prompts[2]
    assert task.score(batch, batch.targets)["labels"] == 1.0


def test_tables_of_babilong(tmp_path, stories):
    path = tmp_path / "0k.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["Input", "Question", "Target", "length"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows({**{k.title(): v for k, v in r.items()}, "length": 1} for r in BABILONG)
    rows = [
        tasks.create_task("babilong", path=p).sample(10, split="train", seed=0).inputs for p in (stories, str(path))
    ]
    assert torch.equal(*rows)
    path.write_text("input,question,target\n" + "x" * 200_000 + ",Where is it?,office\n")
    with pytest.raises(tasks.UsageError, match=r"csv:2: \d+ tokens are more than seq_len"):
        tasks.create_task("babilong", path=str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("babilong", "\n\nOnce upon a time", "f:3: this is no JSON; read are JSON objects with input, question"),
        ("babilong", "a,b\n1,2\n", "f:1: this is no JSON; .* a table .CSV. with these columns, and bAbI's numbered"),
        ("niah", "input,outputs\na,b\n", "f:1: this is no JSON; read are JSON objects with input and outputs"),
        ("babilong", "1 Mary moved.\nWhere is Mary?\thall\n", "f:2: the number of the line is missing"),
        ("babilong", "1 Where is Mary?\thall\t1\n", "f:1: 'input' should be a text, not ''"),
        ("babilong", "input,question\na,b\n", "f:2: 'target' should be a text, and is missing"),
    ],
)
def test_forms_that_are_none_are_named(tmp_path, name, content, message):
    (tmp_path / "f").write_text(content)
    with pytest.raises(tasks.UsageError, match=message):
        tasks.create_task(name, path=str(tmp_path / "f"))


GOOD = json.dumps(RULER[0]).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no question"),
        (b"[]", "holds no question"),
        (b"\n\n", "holds no question"),
        (GOOD + b"\n{\n", ":2: this is no JSON"),
        (GOOD + b"\n" + GOOD[:50], ":2: this is no JSON"),
        (GOOD + b"\n\n7\n", ":3: a JSON object should be here, not '7'"),
        (GOOD + b"\n" + GOOD + b" " + GOOD, ":2: this is no JSON .Extra data"),
        (GOOD + b"\n\xff\xfe", ":2: this is no UTF-8 text"),
        (b"\x00\x01\x02" * 10, ":1: this is no UTF-8 text .the byte 0x00."),
        (b"[" * 100_000, ":1: this is no JSON that can be read"),
        (b'{"input": ' + b"9" * 10_000 + b"}", ":1: this is no JSON that can be read"),
        (b"[" + GOOD + b",\n" + GOOD + b",\n{}]", ":3: 'input' should be a text, and is missing"),
        (b"[" + GOOD + b"\n" + GOOD + b"]", ":2: this is no JSON"),
        (b"[" + GOOD + b"\n", ":2: this is no JSON"),
        (b'{"outputs": ["a"]}', ":1: 'input' should be a text, and is missing"),
        (b'{"input": "", "outputs": ["a"]}', ":1: 'input' should be a text, not ''"),
        (b'{"input": ["x"], "outputs": ["a"]}', r":1: 'input' should be a text, not .\['x'\]"),
        (b'{"input": "x", "outputs": "a"}', ":1: 'outputs' should be a list"),
        (b'{"input": "x", "outputs": []}', ":1: 'outputs' should be a list"),
        (b'{"input": "x", "outputs": ["a", 5]}', ":1: 'outputs' should be a text, not '5'"),
        (b'{"input": "x", "outputs": ["a"], "answer_prefix": 5}', ":1: 'answer_prefix' should be a text"),
        (b'{"input": "\\ud800", "outputs": ["a"]}', ":1: 'input' holds half a character"),
        (GOOD + b"\n" + json.dumps(needle("k", "v", 30)).encode(), r":2: \d+ tokens are more than seq_len=600"),
    ],
)
def test_damaged_files(content, message, tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(content)
    with pytest.raises(tasks.UsageError, match=message) as error:
        tasks.create_task("niah", path=str(path), seq_len=600)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("niah", {"path": "nowhere.jsonl"}, "nowhere.jsonl cannot be read"),
        ("niah", {"path": "."}, "[.] cannot be read"),
        ("niah", {"test_path": "a.jsonl"}, "test_path goes with path"),
        ("niah", {"tokenizer": "a.json"}, "tokenizer goes with path"),
        ("niah", {"path": "a.jsonl", "n_keys": 3}, "n_keys steers the generator and cannot go with path='a.jsonl'"),
        ("niah", {"path": "a.jsonl", "end_token": "</s>"}, "end_token='</s>' goes with tokenizer"),
        ("babilong", {"path": "a.jsonl", "people": 3}, "people steers the generator"),
        ("babilong", {"question": "qa5"}, "question='qa5' is only read from files"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        tasks.create_task(name, **options)
    assert "\n" not in str(error.value)


def test_stories_of_another_kind_are_refused(stories):
    with pytest.raises(tasks.UsageError, match=":1: the target 'bathroom' is no answer to qa6, which are no, yes"):
        tasks.create_task("babilong", path=stories, question="qa6")


def squad(n=12):
    """Two articles of paragraphs with one question each, every third of them without an answer."""
    articles = []
    for a in range(2):
        paragraphs = []
        for i in range(n // 2):
            fact = f"The town of Place{a}{i} has {7 * i + a} towers. " + "It rains there. " * (i % 3)
            answers = [{"text": f"{7 * i + a} towers", "answer_start": 0}, {"text": f"{7 * i + a}", "answer_start": 0}]
            asked = {"question": f"What has Place{a}{i}?", "answers": answers, "id": f"{a}{i}", "is_impossible": False}
            nothing = {"question": "Who?", "answers": [], "id": "x", "is_impossible": True}
            paragraphs.append({"context": fact, "qas": [asked] if i % 3 else [nothing, asked]})
        articles.append({"title": f"Towns {a}", "paragraphs": paragraphs})
    return {"version": "v2.0", "data": articles}


def hotpot(n=8):
    records = []
    for i in range(n):
        documents = [[f"Title {i} {k}", [f"Fact {k} of {i}.", f" Person{i} lived in Town{k}."]] for k in range(3)]
        facts = [[f"Title {i} 0", 0]]
        more = {"_id": str(i), "type": "bridge", "level": "hard"}
        records.append(
            {
                "question": f"Where is {i}?",
                "answer": f"Town{i % 3}",
                "context": documents,
                "supporting_facts": facts,
                **more,
            }
        )
    return records


@pytest.mark.parametrize(("name", "made"), [("qa_1", squad()), ("qa_2", hotpot())])
def test_public_files_are_asked_as_rulers_qa(name, made, tmp_path):
    """Own documents are there, others fill the row, the answer is the first reference, and any of them is enough."""
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(made))
    task = tasks.create_task(name, path=str(path), test_path=str(path), seq_len=1200)
    again = tasks.create_task(name, path=str(path), test_path=str(path), seq_len=1200)
    n = 12 if name == "qa_1" else 8
    batch = task.sample(n, split="test", seed=0)
    assert torch.equal(batch.inputs, again.sample(n, split="test", seed=0).inputs)
    counts = []
    for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
        begin = int((targets != IGNORE).nonzero()[0]) + 1
        prompt, answer = text(inputs[:begin]), text(targets[targets != IGNORE]).strip()
        assert prompt.startswith("Answer the question based on the given documents. Only give me the answer")
        assert prompt.endswith(" Answer:")
        assert prompt.count("Answer the question based on") == 2
        assert answer in prompt
        asked = prompt[prompt.rindex("Question: ") + 10 : -len(" Answer:")]
        place = asked.removesuffix("?").split()[-1]
        if name == "qa_1":
            assert f"The town of {place} has {answer}." in prompt
        else:
            assert all(f"Title {place} {k}\nFact {k} of {place}. Person{place} lived in" in prompt for k in range(3))
        numbers = [int(part.split(":")[0]) for part in prompt.split("Document ")[1:]]
        assert numbers == list(range(1, len(numbers) + 1))
        counts.append(len(numbers))
        assert 900 < len(prompt) <= 1200
    assert min(counts) > 3
    assert task.score(batch, batch.targets)["contained"] == 1
    if name == "qa_1":  # the number alone is the second reference
        short = batch.targets.clone()
        for row in short:
            said = (row != IGNORE).nonzero().flatten()
            end = said[int((row[said] == ord(" ")).nonzero()[-1])]
            row[end : said[-1]] = ord("!")
        assert task.score(batch, short)["contained"] == 1
        short[short != IGNORE] = ord("!")
        assert task.score(batch, short)["contained"] == 0


def test_rulers_own_qa_lines_take_any_reference(tmp_path):
    records = [{"input": f"Which {i}?", "outputs": ["AB", "CD"], "answer_prefix": " Answer:"} for i in range(4)]
    path = lines(tmp_path / "qa.jsonl", records)
    scores = []
    for references in ("any", "all"):
        task = tasks.create_task("niah", path=path, test_path=path, seq_len=60, references=references)
        batch = task.sample(4, split="test", seed=0)
        said = batch.targets.clone()
        for row in said:
            scored = (row != IGNORE).nonzero().flatten()
            row[scored[1:3]] = torch.tensor([ord("A"), ord("B")])
            row[scored[3:]] = 256
        scores.append(task.score(batch, said)["contained"])
    assert scores == [1, 0.5]


def changed(made, change):
    made = json.loads(json.dumps(made))
    change(made)
    return made


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (
            squad(),
            {"references": None},
            "f is a file of SQuAD or HotpotQA, whose answers are alternatives: set task=qa_1",
        ),
        (squad(), {"seq_len": 300}, "f: question 1 has .* tokens with its own documents alone, more than seq_len=300"),
        (changed(squad(), lambda m: m["data"][1].pop("paragraphs")), {}, r"data\[1\].paragraphs should be a list"),
        (
            changed(squad(), lambda m: m["data"][0]["paragraphs"][1]["qas"][0].update(answers=[])),
            {},
            r"data\[0\].paragraphs\[1\].qas\[0\].answers holds no answer",
        ),
        (changed(hotpot(), lambda m: m[2].update(answer=5)), {}, r"\[2\].answer should be a text"),
        (changed(hotpot(), lambda m: m[1]["context"].append(["x"])), {}, "should be a title and a list of sentences"),
    ],
)
def test_faults_of_public_files(made, options, message, tmp_path):
    path = tmp_path / "f"
    path.write_text(json.dumps(made))
    given = {"references": "any", "seq_len": 2000, **options}
    with pytest.raises(tasks.UsageError, match=message) as refusal:
        tasks.create_task("niah", path=str(path), **given)
    assert "\n" not in str(refusal.value)


def test_rulers_qa_needs_a_file(stories):
    with pytest.raises(tasks.UsageError, match="references goes with path, a file of questions"):
        tasks.create_task("qa_1")
    with pytest.raises(tasks.UsageError, match="references='any' is of files in RULER's form: leave it out"):
        tasks.create_task("babilong", path=stories, references="any", seq_len=400)
