from __future__ import annotations

import ast
import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from zoo import tasks
from zoo.tasks import random
from zoo.tasks.code_trace import Tracer, child, programs, read_functions, sandbox, tokens
from zoo.tasks.protocol import IGNORE, SPLITS
from zoo.training import doctor

MARK = "  # << START_OF_TRACE"


def task(**options):
    return tasks.create_task("code_trace", **options)


def parts(batch, row):
    """The program and the scored text of a row, from its tokens alone."""
    inputs, targets = batch.inputs[row].tolist(), batch.targets[row].tolist()
    start = next(i for i, target in enumerate(targets) if target != IGNORE)
    asked = [target for target in targets if target != IGNORE]
    given = tokens.to_text(inputs[: start + 1])
    assert given[:2] == tokens.BEGIN + tokens.CONTEXT
    assert given[-1] == tokens.FRAME
    return given[2:-1], tokens.to_text(asked)


def frames_of(source, room=10_000):
    names = {}
    exec(compile(source, "<program>", "exec"), names)
    tracer = Tracer(source, room, repr)
    tracer.run(names["main"])
    return tracer


def text_of(source):
    return tokens.readable("".join(map(tokens.frame_text, frames_of(source).frames))).replace("<frame_sep>", "\n")


def oracle(source):
    """The trace of a program, by a tracer of its own that knows only the form."""
    lines, out, seen = source.replace(MARK, "").splitlines(keepends=True), [], []

    def watch(frame, event, arg):
        line = lines[frame.f_lineno - 1]
        if event == "call":
            seen.append({})
        if event in ("call", "line"):
            now = {k: str(v) for k, v in frame.f_locals.items()}
            shown = {k: ".." if seen[-1].get(k) == v else v for k, v in now.items()}
            seen[-1] = now
            out.append((tokens.CALL if event == "call" else tokens.LINE) + json.dumps(shown) + tokens.ACTION + line)
        elif event == "exception":
            out.append(f"{tokens.EXCEPTION}{tokens.ACTION}{line}{tokens.ARG}{json.dumps(arg[0].__name__)}")
        else:
            seen.pop()
            if arg is not None:  # programs of the grammar never return None
                out.append(f"{tokens.RETURN}{tokens.ACTION}{line}{tokens.ARG}{json.dumps(str(arg))}")
        return watch

    names = {}
    exec(source, names)
    main, outer = names["main"], sys.gettrace()
    sys.settrace(watch)
    try:
        main()
    except (ZeroDivisionError, IndexError):
        pass
    finally:
        sys.settrace(outer)
    return "".join(frame + tokens.FRAME for frame in out) + tokens.END


HAND = [
    (
        f"def f(x, y):\n    x += y\n    return x\n\ndef main():{MARK}\n    a = 4\n    return f(a, 2)\n",
        """
        <call_sep>{}<action_sep>def main():\\n
        <line_sep>{}<action_sep>    a = 4\\n
        <line_sep>{"a": "4"}<action_sep>    return f(a, 2)\\n
        <call_sep>{"x": "4", "y": "2"}<action_sep>def f(x, y):\\n
        <line_sep>{"x": "..", "y": ".."}<action_sep>    x += y\\n
        <line_sep>{"x": "6", "y": ".."}<action_sep>    return x\\n
        <return_sep><action_sep>    return x\\n<arg_sep>"6"
        <return_sep><action_sep>    return f(a, 2)\\n<arg_sep>"6"
        """,
    ),
    (  # a list changed in place; the caller's variables are told anew only where they differ
        f"def f(b):\n b.append(3)\n return 0\ndef main():{MARK}\n c = [1]\n d = f(c)\n return c\n",
        """
        <call_sep>{}<action_sep>def main():\\n
        <line_sep>{}<action_sep> c = [1]\\n
        <line_sep>{"c": "[1]"}<action_sep> d = f(c)\\n
        <call_sep>{"b": "[1]"}<action_sep>def f(b):\\n
        <line_sep>{"b": ".."}<action_sep> b.append(3)\\n
        <line_sep>{"b": "[1, 3]"}<action_sep> return 0\\n
        <return_sep><action_sep> return 0\\n<arg_sep>"0"
        <line_sep>{"c": "[1, 3]", "d": "0"}<action_sep> return c\\n
        <return_sep><action_sep> return c\\n<arg_sep>"[1, 3]"
        """,
    ),
    (  # an exception is told in every scope that it passes, and leaves no return behind
        f"def f(a):\n return 1 // a\ndef main():{MARK}\n try:\n  f(0)\n except ZeroDivisionError:\n  f(0)\n",
        """
        <call_sep>{}<action_sep>def main():\\n
        <line_sep>{}<action_sep> try:\\n
        <line_sep>{}<action_sep>  f(0)\\n
        <call_sep>{"a": "0"}<action_sep>def f(a):\\n
        <line_sep>{"a": ".."}<action_sep> return 1 // a\\n
        <exception_sep><action_sep> return 1 // a\\n<arg_sep>"ZeroDivisionError"
        <exception_sep><action_sep>  f(0)\\n<arg_sep>"ZeroDivisionError"
        <line_sep>{}<action_sep> except ZeroDivisionError:\\n
        <line_sep>{}<action_sep>  f(0)\\n
        <call_sep>{"a": "0"}<action_sep>def f(a):\\n
        <line_sep>{"a": ".."}<action_sep> return 1 // a\\n
        <exception_sep><action_sep> return 1 // a\\n<arg_sep>"ZeroDivisionError"
        <exception_sep><action_sep>  f(0)\\n<arg_sep>"ZeroDivisionError"
        """,
    ),
    (  # None is returned, not raised; text is told by its `repr` inside JSON
        f"def main():{MARK}\n s = 'a\"b'\n for c in s[:1]:\n  pass\n",
        """
        <call_sep>{}<action_sep>def main():\\n
        <line_sep>{}<action_sep> s = 'a"b'\\n
        <line_sep>{"s": "'a\\"b'"}<action_sep> for c in s[:1]:\\n
        <line_sep>{"s": "..", "c": "'a'"}<action_sep>  pass\\n
        <line_sep>{"s": "..", "c": ".."}<action_sep> for c in s[:1]:\\n
        <return_sep><action_sep> for c in s[:1]:\\n<arg_sep>"None"
        """,
    ),
    (  # the exception leaves through `finally`, whose last line returns nothing
        f"def main():{MARK}\n try:\n  [][0]\n finally:\n  x = 1\n",
        """
        <call_sep>{}<action_sep>def main():\\n
        <line_sep>{}<action_sep> try:\\n
        <line_sep>{}<action_sep>  [][0]\\n
        <exception_sep><action_sep>  [][0]\\n<arg_sep>"IndexError"
        <line_sep>{}<action_sep>  x = 1\\n
        """,
    ),
]


@pytest.mark.parametrize(("source", "expected"), HAND)
def test_tracer(source, expected):
    assert text_of(source).splitlines() == [line.strip() for line in expected.strip().splitlines()]


def test_tracer_puts_back_the_one_before():
    outer = sys.gettrace()
    seen = []
    sys.settrace(lambda *event: seen.append(event))
    try:
        mine = sys.gettrace()
        frames_of("def main():\n return 1\n")
        assert sys.gettrace() is mine
    finally:
        sys.settrace(outer)


def test_an_endless_program_is_stopped():
    for body in (" while 1:\n  x = 1\n", " return main()\n", " try:\n  main()\n except Exception:\n  main()\n"):
        assert frames_of("def main():\n" + body, room=3000).stopped == "room"


def test_room_is_exact():
    source = HAND[0][0]
    needed = len("".join(map(tokens.frame_text, frames_of(source).frames)))
    assert frames_of(source, needed).stopped is None
    assert frames_of(source, needed - 1).stopped == "room"


@pytest.mark.parametrize("answer", ["trace", "final"])
@pytest.mark.parametrize("split", SPLITS)
def test_running_the_source_again_solves_it(answer, split):
    it = task(answer=answer)
    batch = it.sample(60, split=split, seed=1)
    predictions = torch.zeros_like(batch.targets)
    for row in range(60):
        source, _ = parts(batch, row)
        said = oracle(source)
        if answer == "final":
            last = said[: -len(tokens.FRAME + tokens.END)].rpartition(tokens.FRAME)[2]
            said = last[0] + tokens.ARG + last.partition(tokens.ARG)[2] + tokens.FRAME + tokens.END
        ids = torch.tensor([ord(c) for c in said])
        where = (batch.targets[row] != IGNORE).nonzero()[:, 0]
        assert len(where) == len(ids)
        predictions[row, where] = ids
    score = it.score(batch, predictions)
    assert [score[k] for k in ("accuracy", "exact", "frames", "final")] == [1.0] * 4


def test_a_row_is_one_text_moved_by_one():
    batch = task(seq_len=300).sample(40, split="train", seed=0)
    scored = batch.targets != IGNORE
    for row in range(40):
        where = scored[row].nonzero()[:, 0]
        assert (where.diff() == 1).all()
        assert torch.equal(batch.inputs[row, where[1:]], batch.targets[row, where[:-1]])
        assert batch.targets[row, where[-1]] == ord(tokens.END)
        assert (batch.inputs[row, where[-1] + 2 :] == 0).all()


def test_both_answers_ask_of_the_same_programs():
    traced, final = (task(answer=a).sample(50, split="test", seed=3) for a in ("trace", "final"))
    assert traced.slices.keys() == final.slices.keys()
    for row in range(50):
        source, trace = parts(traced, row)
        again, last = parts(final, row)
        assert source == again
        assert tokens.outcome(trace) == tokens.outcome(last) is not None


def test_chance():
    it = task()
    batch = it.sample(400, split="test", seed=0)
    guesses = torch.randint(tokens.VOCAB_SIZE, batch.targets.shape, generator=torch.Generator().manual_seed(0))
    score = it.score(batch, guesses)
    n = int((batch.targets != IGNORE).sum())
    assert abs(score["accuracy"] * tokens.VOCAB_SIZE - 1) < 6 * (tokens.VOCAB_SIZE / n) ** 0.5
    assert score["exact"] == score["frames"] == score["final"] == 0


def test_one_wrong_character_costs_one_frame():
    it = task()
    batch = it.sample(30, split="test", seed=0)
    predictions = batch.targets.clone()
    counts = []
    for row in range(30):
        _, trace = parts(batch, row)
        counts.append(trace.count(tokens.FRAME))
        start = int((batch.targets[row] != IGNORE).nonzero()[0])
        second = trace.index(tokens.FRAME) + 2
        predictions[row, start + second] = ord("%")  # in the second frame
    score = it.row_scores(batch, predictions)
    assert torch.allclose(score["frames"], torch.tensor([(c - 1) / c for c in counts]).double())
    assert (score["final"] == 1).all()
    last = batch.targets.clone()
    for row in range(30):
        place = (last[row] == ord('"')).nonzero()[-1] - 1  # the last character of the last value
        last[row, place] = ord("%")
    score = it.row_scores(batch, last)
    assert torch.allclose(score["frames"], torch.tensor([(c - 1) / c for c in counts]).double())
    assert (score["final"] == 0).all()


def test_outcome():
    for said, expected in [
        (f'{tokens.RETURN}{tokens.ARG}"7"{tokens.FRAME}{tokens.END}', ("return", '"7"')),
        (f'{tokens.EXCEPTION}{tokens.ACTION}x{tokens.ARG}"E"{tokens.FRAME}{tokens.END}rest', ("exception", '"E"')),
        (f'{tokens.RETURN}{tokens.ARG}"1"{tokens.FRAME}{tokens.RETURN}{tokens.ARG}"2"{tokens.END}', ("return", '"2"')),
        (f'{tokens.RETURN}{tokens.ARG}"1"{tokens.FRAME}', None),
        (f'{tokens.ARG}"7"{tokens.END}', None),
        (tokens.END, None),
        ("", None),
    ]:
        assert tokens.outcome(said) == expected


def test_text_and_tokens():
    text = "".join(map(chr, range(tokens.VOCAB_SIZE)))
    assert tokens.to_text(tokens.to_tokens(text).tolist()) == text
    assert tokens.to_text([-100, 65, 900]) == "?A?"


SWITCHES = {
    "branches": (ast.If,),
    "loops": (ast.For, ast.While),
    "lists": (ast.List, ast.Subscript),
    "exceptions": (ast.Try,),
}


def nodes(batch):
    return [list(ast.walk(ast.parse(parts(batch, row)[0]))) for row in range(len(batch.inputs))]


@pytest.mark.parametrize("name", [*SWITCHES, "calls"])
def test_constructs_are_switched_off(name):
    of = {"branches": "branch", "loops": "loop", "lists": "list", "exceptions": "exception", "calls": "call"}[name]
    on, off = (task(**{name: value}).sample(250, split="train", seed=0) for value in (True, False))
    assert on.slices[of].sum() > 4
    assert off.slices[of].sum() == 0
    for programs_, expected in ((nodes(on), True), (nodes(off), False)):
        found = [n for program in programs_ for n in program]
        if name == "calls":
            assert (sum(isinstance(n, ast.FunctionDef) for n in found) > len(programs_)) is expected
        else:
            assert any(isinstance(n, SWITCHES[name]) for n in found) is expected


def test_slices_tell_what_programs_do():
    batch = task().sample(300, split="train", seed=0)
    for row, program in enumerate(nodes(batch)):
        source, trace = parts(batch, row)
        assert batch.slices["branch"][row] == any(isinstance(n, ast.If) for n in program)
        assert batch.slices["loop"][row] == any(isinstance(n, (ast.For, ast.While)) for n in program)
        assert batch.slices["list"][row] == any(isinstance(n, (ast.List, ast.Subscript)) for n in program)
        assert batch.slices["call"][row] == (trace.count(tokens.CALL) > 1)
        assert batch.slices["exception"][row] == (tokens.EXCEPTION in trace)
        lines = source.count("\n")
        assert lines <= batch.slices["lines"][row] < lines * 1.5 + 1


def test_sizes():
    small = task(max_statements=2, max_depth=0, max_value=20, seq_len=256, calls=False)
    for program in nodes(batch := small.sample(150, split="train", seed=0)):
        assert sum(isinstance(n, ast.stmt) for n in program) <= 1 + 1 + 2 * 4 + 1  # def, first, `try` is four, return
        assert not any(isinstance(n, (ast.If, ast.For, ast.While)) for n in program)
    for row in range(150):
        source, trace = parts(batch, row)
        assert 2 + len(source) + len(trace) <= 256
        values = [int(w) for w in trace.replace("-", " ").replace("[", " ").split('"') if w.isdigit()]
        assert max(values) <= 20
    deep = task(max_statements=12, max_depth=4, seq_len=1024).sample(100, split="train", seed=0)
    assert max(len(line) - len(line.lstrip()) for r in range(100) for line in parts(deep, r)[0].split("\n")) > 3
    assert small.sample(3, split="test", seed=0).inputs.shape == (3, 256)


def test_programs_end_by_themselves():
    """No program needs the limits to end: they run without a tracer, and no longer than what the grammar allows."""
    grammar = programs.Grammar(14, 4, 99, True, True, True, True, True)
    words = random.bits(random.row_keys("train", 5, 0, 400), programs.words_for(grammar)) >> 32
    for row in words.tolist():
        source = programs.write(row, grammar)
        names = {}
        exec(source, names)
        tracer = Tracer(source, 10**6, lambda value: "")
        tracer.run(names["main"])
        assert tracer.stopped is None
        values = {frame.value for frame in tracer.frames if frame.kind == "exception"}
        assert values <= {'"IndexError"', '"ZeroDivisionError"'}


def test_splits_are_disjoint_up_to_names():
    it = task(max_statements=2, seq_len=192)
    forms = {
        split: {programs.normal_form(parts(batch, row)[0]) for row in range(400)}
        for split in SPLITS
        for batch in [it.sample(400, split=split, seed=0)]
    }
    assert not forms["train"] & (forms["validation"] | forms["test"])
    assert not forms["validation"] & forms["test"]


def test_normal_form():
    one = f"def f(a):\n return len(a)\ndef main():{MARK}\n b = [1]\n return f(b)\n"
    other = "def g(z):\n return len(z)\ndef main():\n q = [1]\n return g(q)\n"
    assert programs.normal_form(one) == programs.normal_form(other)
    for changed in (other.replace("[1]", "[2]"), other.replace("len", "sum"), other.replace("(q)", "(z)")):
        assert programs.normal_form(changed) != programs.normal_form(other)


def test_row_does_not_depend_on_the_tracer_of_others():
    expected = task().sample(5, split="train", seed=0)
    outer = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        again = task().sample(5, split="train", seed=0)
    finally:
        sys.settrace(outer)
    assert torch.equal(expected.inputs, again.inputs)


def test_render():
    it = task()
    batch = it.sample(2, split="train", seed=0)
    source, trace = parts(batch, 1)
    right = it.render(batch, 1, batch.targets)
    assert [line[: len(s)] for line, s in zip(right.splitlines()[1:], source.splitlines(), strict=False)] == (
        source.splitlines()[: len(right.splitlines()) - 1]
    )
    assert not any("! " in line for line in right.splitlines()[1:])
    wrong = batch.targets.clone()
    start = int((wrong[1] != IGNORE).nonzero()[0])
    wrong[1, start] = ord("x")
    wrong[1, start + 1] = ord(tokens.FRAME)
    lines = it.render(batch, 1, wrong).splitlines()
    said = next(i for i, line in enumerate(lines) if "! x<frame_sep>" in line)
    assert lines[said + 1].endswith("^" * len("x<frame_sep>"))
    assert sum("^" in line for line in lines[1:]) == 1
    assert trace.count(tokens.FRAME) == sum("|" in line for line in right.splitlines())


FUNCTIONS = '''"""Functions of mine."""
from functools import reduce

LIMIT = 3

def gcd(a, b):
    while b:
        a, b = b, a % b
    return a

def double(x):
    return helper(x) * 2

def helper(x):
    print("not seen")
    return reduce(lambda a, b: a + b, [x, LIMIT])

def order(xs):
    return sorted(set(xs), key=str)

class Point:
    def __init__(self, x):
        self.x = x

def point():
    p = Point(LIMIT)
    return p

gcd(12, 18)
gcd(7, 5)
double(4)
order(["c", "a", "b"])
point()
'''


def write(tmp_path, text, name="mine.py"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_a_file_of_functions(tmp_path):
    found = read_functions(write(tmp_path, FUNCTIONS), 2000)
    assert [example.frames[-1].value for example in found] == ['"6"', '"1"', '"14"', '"[\'a\', \'b\', \'c\']"',
                                                              '"<program.Point object>"']  # fmt: skip
    double = found[2].source
    assert "gcd" not in double, "only what is needed"
    assert double.index("LIMIT = 3") < double.index("def helper")
    assert double.endswith(f"def main():{MARK}\n    return double(4)\n")
    assert found[0].context == found[1].context
    exec(double, names := {})
    assert names["main"]() == 14
    assert FUNCTIONS.splitlines()[found[0].line - 1] == "gcd(12, 18)"


def test_a_file_says_the_same_every_time(tmp_path):
    path = write(tmp_path, "def f(x):\n    return {x, 'a', 'b', 'c', 'd'}, object()\nf('e')\n")
    assert len({str(read_functions(path, 2000)) for _ in range(4)}) == 1


def test_a_task_of_the_users_functions(tmp_path):
    text = "".join(f"def f{i}(x):\n    y = x + {i}\n    return y\nf{i}(1)\nf{i}(2)\n" for i in range(40))
    path = write(tmp_path, text)
    it = task(path=path, seq_len=320)
    seen = {}
    for split in SPLITS:
        batch = it.sample(60, split=split, seed=0)
        sources = {parts(batch, row)[0] for row in range(60)}
        assert all(oracle(source) == parts(batch, row)[1] for row, source in [(0, parts(batch, 0)[0])])
        seen[split] = {source.partition("def main")[0] for source in sources}
        assert it.score(batch, batch.targets)["final"] == 1
    assert not seen["train"] & (seen["validation"] | seen["test"])
    held_out = write(tmp_path, "def g(x):\n    return x\ng(1)\ng(2)\ng(3)\n", "test.py")
    both = task(path=path, test_path=held_out, seq_len=320)
    batch = both.sample(3, split="test", seed=0)
    assert [tokens.outcome(parts(batch, row)[1])[1] for row in range(3)] == ['"1"', '"2"', '"3"']
    same = task(path=held_out, test_path=held_out, seq_len=320)
    assert torch.equal(same.sample(3, split="test", seed=0).inputs, batch.inputs)
    mixed = task(test_path=held_out, seq_len=320, loops=False)
    assert torch.equal(mixed.sample(3, split="test", seed=0).inputs, batch.inputs)
    assert torch.equal(
        mixed.sample(3, split="train", seed=0).inputs,
        task(seq_len=320, loops=False).sample(3, split="train", seed=0).inputs,
    )
    with pytest.raises(tasks.UsageError, match="falls into the split 'validation'"):
        task(path=held_out, seq_len=256).sample(1, split="validation", seed=0)


BOMB = "def f():\n    {}\n    return 1\nf()\n"
POSIX = """C = ().__class__.__base__.__subclasses__()
P = [c for c in C if c.__name__ == "BuiltinImporter"][0].load_module("posix")
"""
OVERTIME = "mine.py' did not end within|mine.py' took too much processor time"
HOSTILE = {
    "a loop": (BOMB.format("while True:\n        x = 1"), "mine.py:5: f.. and its trace take more tokens"),
    "a loop of one line": (BOMB.format("while True: pass"), OVERTIME),
    "a loop that hides": (
        "def f():\n while True:\n  try:\n   while True: pass\n  except BaseException: pass\nf()\n",
        OVERTIME,
    ),
    "a loop in C": ("def f():\n    return sum(range(10**18))\nf()\n", OVERTIME),
    "a loop outside": ("X = [0 for _ in iter(int, 1)]\ndef f():\n    return X\nf()\n", OVERTIME + "|MemoryError"),
    "memory": (BOMB.format("x = [0] * 10**10"), "mine.py:4: f.. takes more than 512 MiB"),
    "memory bit by bit": ("def f():\n    return len([bytes(10**6) for i in range(10**6)])\nf()\n", "more than 512 MiB"),
    "a large value": ("def f():\n    return 'x' * 10**7\nf()\n", "seq_len=1023"),
    "writing": (BOMB.format("open('{folder}/harm', 'w').write('x')"), "mine.py:4: f.. wants .*: open"),
    "writing, hidden": (
        "def f():\n    try:\n        open('{folder}/harm', 'w')\n    except:\n        pass\n    return 1\nf()\n",
        "mine.py:7: f.. wants .*: open",
    ),
    "reading": (BOMB.format("open('/etc/passwd').read()"), ": open"),
    "a process": (BOMB.format("import os; os.fork()"), "import os"),
    "a process by another way": ("import sys\ndef f():\n    return sys\nf()\n", "import sys"),
    "a fork": (POSIX + "def f():\n    while True:\n        P.fork()\nf()\n", ": os.fork"),
    "a fork outside": (POSIX + "X = P.fork()\ndef f():\n    return X\nf()\n", ": os.fork"),
    "a spawn": (POSIX + "def f():\n    P.posix_spawn('/bin/sleep', ['sleep', '60'], {})\nf()\n", ": os.posix_spawn"),
    "a kill": (POSIX + "def f():\n    P.kill({pid}, 9)\nf()\n", ": os.kill"),
    "removing": (POSIX + "def f():\n    P.remove('{folder}/../mine.py')\nf()\n", ": os.remove"),
    "hidden writing": (POSIX + "def f():\n    P.open('{folder}/harm', 65)\nf()\n", ": open"),
    "a socket": ("import socket\ndef f():\n    return socket\nf()\n", "import socket"),
    "the interpreter's insides": ("import ctypes\ndef f():\n    return ctypes\nf()\n", "import ctypes"),
    "a thread": ("import threading\ndef f():\n    return threading\nf()\n", "import threading"),
    "leaving": (POSIX + "def f():\n    P._exit(0)\nf()\n", "ended its process"),
    "leaving politely": ("def f():\n    raise SystemExit\nf()\n", None),
    "asking": (BOMB.format("input()"), "builtins.input"),
    "depth": ("X = " + "(" * 5000 + ")" * 5000 + "\n", "mine.py:1"),
    "more depth": ("X = " + "-" * 200_000 + "1\n", "mine.py:1|ended its process"),
    "recursion": ("def f(x):\n    return f(x)\nf(1)\n", "tokens, more than seq_len=1023"),
}


ROUTES = {  # to the child's own modules, from its frames, functions and classes
    "a generator's frames": """
def reach():
    def walk():
        frame = walking.gi_frame
        while "confine" not in frame.f_globals:
            frame = frame.f_back
        yield frame.f_globals
    walking = walk()
    return next(walking)
""",
    "a traceback": """
def reach():
    try:
        1 / 0
    except ZeroDivisionError as error:
        frame = error.__traceback__.tb_frame
        while "confine" not in frame.f_globals:
            frame = frame.f_back
        return frame.f_globals
""",
    "the import": """
def reach():
    return __builtins__["__import__"].__func__.__globals__
""",
    "a subclass": """
def reach():
    kinds = type.__subclasses__(object)
    return [k for k in kinds if k.__name__ == "Guard"][0].audit.__globals__
""",
}
ACTS = {
    "a pipe": "reach()['os'].mkfifo('{folder}/harm')",
    "a node": "reach()['os'].mknod('{folder}/harm')",
    "a link": "reach()['os'].symlink('/etc/passwd', '{folder}/harm')",
    "a folder": "reach()['os'].mkdir('{folder}/harm')",
    "a file": "reach()['builtins'].open('{folder}/harm', 'w')",
    "a root": "reach()['os'].chroot('{folder}')",
    "a priority": "reach()['os'].setpriority(0, {pid}, 19)",
    "a signal": "reach()['os'].kill({pid}, 9)",
    "a program": "reach()['os'].execv('/bin/true', ['true'])",
    "a process": "reach()['os'].system('true')",
    "a limit": "reach()['resource'].prlimit({pid}, 7, (16, 16))",
    "a function in C": "reach()['confine']._call('kill', {pid}, 9)",
}
CLASSES = """
def classes(base):
    for kind in type.__subclasses__(base):
        globals().setdefault(kind.__name__, kind)
        if kind is not type:
            classes(kind)
classes(object)
"""


def untraced(code):
    """A file that runs code which the tracer does not see, and so cannot find too long."""
    return f"CODE = {code!r}\ndef f():\n    exec(CODE, {{'__builtins__': __builtins__}})\n    return 1\nf()\n"


HOSTILE |= {
    f"{act} by {route}": (untraced(f"{ROUTES[route]}\n{ACTS[act]}\n"), "f.. wants what is not allowed here: ")
    for act, route in [*((act, "the import") for act in ACTS), *(("a pipe", route) for route in ROUTES)]
}
HOSTILE |= {
    "the way to any process": (
        """def f(n):
    c = [c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'BuiltinImporter'][0]
    s, p = c.load_module('_signal'), c.load_module('posix')
    s.pidfd_send_signal(p.pidfd_open({pid}), 9)
f(1)
""",
        "wants what is not allowed here: ",
    ),
    "a pidfd": (POSIX + "def f():\n    return P.pidfd_open({pid})\nf()\n", ": os.pidfd_open"),
    "a pipe": (POSIX + "def f():\n    return P.mkfifo('{folder}/harm')\nf()\n", ": os.mkfifo"),
    "a module anew": (POSIX.replace("posix", "_socket") + "def f():\n    return P\nf()\n", "f.. wants|ImportError"),
    "an encoding": ("def f():\n    return 'a'.encode('idna')\nf()\n", "not allowed here: import encodings.idna"),
    "a stream": (untraced(CLASSES + "FileIO('/etc/passwd').read()\n"), ": open"),
    "a crash in C": (
        untraced(CLASSES + "class Own(CFuncPtr):\n _flags_, _restype_ = 1, None\nOwn(1)()\n"),
        "ended its process",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path, monkeypatch, name):
    text, message = HOSTILE[name]
    monkeypatch.setattr(sandbox, "SECONDS", 3)
    (tmp_path / "out").mkdir()
    path = write(tmp_path, text.replace("{folder}", str(tmp_path / "out")).replace("{pid}", str(os.getpid())))
    before, start = set(os.listdir()), time.monotonic()
    if message is None:
        assert read_functions(path, 1024)[0].frames[-1].value == '"SystemExit"'
    else:
        with pytest.raises(tasks.UsageError, match=message) as error:
            read_functions(path, 1024)
        assert "mine.py" in str(error.value)
        assert "\n" not in str(error.value)
    assert time.monotonic() - start < 30
    assert os.listdir(tmp_path / "out") == []
    assert set(os.listdir()) == before
    while running(str(sandbox._CHILD)) and time.monotonic() - start < 30:
        time.sleep(0.01)  # a process that was killed may take a moment to be gone
    assert not running(str(sandbox._CHILD))


def running(script):
    """Processes of ours whose command names a script."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if script.encode() in (folder / "cmdline").read_bytes():
                found.append(folder)
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    "said",
    [
        b"", b"null", b"[1, 2]", b"[" * 10**5, b'{"examples": [{"line": 1}]}', b'{"examples": 3}', b'{"error": [1]}',
        b'{"examples": [{"line": 1, "context": "", "source": "x", "frames": [["jump", "", "", ""]]}]}',
        b'{"examples": [{"line": 1, "context": "", "source": "x", "frames": [["line", "{}", "x", "1"]]}]}',
        b'{"examples": [{"line": 1, "context": "", "source": "x", "frames": []}]}',
        b'{"examples": [{"line": 1, "context": "", "source": "\\u00ff", "frames": [["return", "", "x", "1"]]}]}',
        b'{"examples": [{"line": 1, "context": "", "source": "x", "frames": [["return", "", "\\u0000", "1"]]}]}',
        b"\x80\x04N.", b'{"examples": [{"line": 1, "context": "", "source": "x", "frames": [["return", "", 5, "1"]]}]}',
    ],
)  # fmt: skip
def test_a_child_that_lies_is_not_believed(tmp_path, monkeypatch, said):
    """Whatever a taken-over child writes is either sound or refused in one line."""
    liar = tmp_path / "liar.py"
    liar.write_text(f"import os, sys\nsys.stdin.read()\nos.write(1, {said!r})\n")
    monkeypatch.setattr(sandbox, "_CHILD", liar)
    with pytest.raises(tasks.UsageError, match="before its traces could be read"):
        read_functions(write(tmp_path, "def f():\n    return 1\nf()\n"), 512)


def test_what_a_child_says_is_bounded(tmp_path, monkeypatch):
    """Output past the limit ends the child, and an error is one printable line."""
    liar = tmp_path / "liar.py"
    liar.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(child.__file__).parent)!r})\nimport child\nchild.limit()\n"
        "sys.stdin.read()\nwhile True: sys.stdout.buffer.write(bytes(2**20))\n"
    )
    monkeypatch.setattr(sandbox, "_CHILD", liar)
    path = write(tmp_path, "def f():\n    return 1\nf()\n")
    with pytest.raises(tasks.UsageError, match="before its traces could be read"):
        read_functions(path, 512)
    liar.write_text('import sys\nsys.stdin.read()\nprint(\'{"error": [3, "a\\\\nb\\\\u001b[31m"]}\')\n')
    with pytest.raises(tasks.UsageError, match=r"mine.py:3: a b \[31m\.$"):
        read_functions(path, 512)


needs_the_wall = pytest.mark.skipif(not sandbox.barriers()[0], reason="no filter of system calls here")
FREE = {"kill": {"x86_64": 62, "aarch64": 129}, "socket": {"x86_64": 41, "aarch64": 198}}


@needs_the_wall
@pytest.mark.parametrize("call", FREE)
def test_the_kernel_refuses_what_the_interpreter_lets_through(tmp_path, call):
    """A system call by a pointer to C's own function, which is there already, raises no audit event."""
    number = FREE[call][os.uname().machine]
    arguments = f"{os.getpid()}, 9" if call == "kill" else "1, 1, 0"
    code = ROUTES["the import"] + f"SAID = reach()['confine']._call('syscall', {number}, {arguments})\n"
    text = untraced(code).replace("{'__builtins__': __builtins__})\n    return 1", "globals())\n    return SAID")
    (example,) = read_functions(write(tmp_path, text), 2000)
    assert example.frames[-1].value == '"-1"'


LOCKED = """
import importlib, json, os, sys
sys.path.insert(0, sys.argv[1])
import child, confine, ctypes
for module in child.MODULES:
    importlib.import_module(module)
if os.geteuid() == 0 and sys.argv[2] == "nobody":
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
if sys.argv[3] == "without":
    confine.isolate = list
held = child.lock_in()
sys.addaudithook(lambda *_: None)
folder, errors = sys.argv[4].encode(), {}
for name, *arguments in [
    ("open", b"/etc/passwd", 0), ("open", b"/dev/null", 1), ("openat", -100, b"/etc", 0), ("socket", 2, 1, 0),
    ("socket", 1, 1, 0), ("socketpair", 1, 1, 0, ctypes.create_string_buffer(8)), ("fork",), ("vfork",), ("kill", 1, 0),
    ("kill", int(sys.argv[5]), 0), ("mkfifo", folder + b"/harm", 0o600), ("mknod", folder + b"/harm", 0o600, 0),
    ("symlink", b"/", folder + b"/harm"), ("mkdir", folder + b"/harm", 0o700), ("unlink", folder), ("chroot", folder),
    ("chdir", b"/"), ("setpriority", 0, 0, 19), ("ptrace", 16, int(sys.argv[5]), 0, 0), ("execv", b"/bin/true", None),
    ("setuid", 0), ("unshare", 0x10000000), ("mount", None, folder, b"tmpfs", 0, None), ("shmget", 0, 4096, 0o1600),
    ("memfd_create", b"harm", 0), ("prctl", 22, 0, 0, 0, 0),
    ("process_vm_readv", int(sys.argv[5]), None, 0, None, 0, 0),
    ("dup", 1), ("read", 0, ctypes.create_string_buffer(8), 1), ("write", 2, b"x", 1), ("ioctl", 1, 0x5412, b"x"),
    ("personality", 0), ("sendto", 1, b"x", 1, 0, None, 0), ("mprotect", 0, 4096, 7),
]:
    ctypes.set_errno(0)
    said = getattr(confine._libc, name)(*arguments)
    errors[f"{name} {arguments[:2]}"] = [said, ctypes.get_errno()]
os.write(1, json.dumps([held, errors]).encode())
os._exit(0)
"""


@needs_the_wall
@pytest.mark.parametrize("namespaces", ["with", "without"])
@pytest.mark.parametrize("user", ["self", "nobody"])
def test_whatever_runs_in_the_child_reaches_nothing_outside(tmp_path, user, namespaces):
    folder = Path(child.__file__).parent
    command = [sys.executable, "-c", LOCKED, folder, user, namespaces, tmp_path, str(os.getpid())]
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    held, errors = json.loads(done.stdout)
    assert {"no_new_privs", "seccomp", "limits", "audit hook"} <= set(held)
    assert namespaces == "with" or not [step for step in held if "namespace" in step]
    assert {name: said for name, said in errors.items() if said != [-1, errno.EPERM]} == {}
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_wall(tmp_path, monkeypatch):
    """A system whose kernel filters no calls: a child that knows of none."""
    folder = tmp_path / "package"
    folder.mkdir()
    for name in ("child.py", "tracer.py", "confine.py"):
        text = Path(child.__file__).with_name(name).read_text()
        (folder / name).write_text(
            text.replace("def _seccomp() -> bool:", "def _seccomp():\n    return False\n\n\ndef _():")
        )
    monkeypatch.setattr(sandbox, "_CHILD", folder / "child.py")
    sandbox.barriers.cache_clear()
    yield
    sandbox.barriers.cache_clear()


def test_without_a_filter_of_calls_no_file_is_run_but_one_that_is_trusted(no_wall, tmp_path, monkeypatch):
    path = write(tmp_path, "def f():\n    return 1\nf()\n")
    assert not sandbox.barriers()[0]
    monkeypatch.setenv("ZOO_TRUST", os.pathsep.join(["other.py", str(tmp_path)]))
    with pytest.raises(tasks.UsageError, match=r"mine.py is not run: .* if you trust it, set ZOO_TRUST=.*mine.py\.$"):
        read_functions(path, 512)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOO_TRUST", os.pathsep.join(["other.py", "./mine.py"]))
    assert read_functions(path, 512)[0].frames[-1].value == '"1"'
    hostile = write(tmp_path, POSIX + "def f():\n    return P.pidfd_open(1)\nf()\n")
    with pytest.raises(tasks.UsageError, match=r"os\.pidfd_open"):
        read_functions(hostile, 512)


def test_the_doctor_says_what_confines_a_file(no_wall):
    assert "refused, as this system has no filter" in doctor._traced_files(doctor.traced_files())
    assert doctor._traced_files({"confined": True, "by": ["a", "b"]}) == "confined by a, b"


def test_the_child_gives_up_its_limits_for_good():
    code = f"""
import sys
sys.path.insert(0, {str(Path(child.__file__).parent)!r})
import child, resource
child.limit()
for kind, most in {{"CPU": child.SECONDS, "AS": child.MEMORY, "FSIZE": child.OUTPUT, "NPROC": 0, "CORE": 0}}.items():
    assert resource.getrlimit(getattr(resource, "RLIMIT_" + kind)) == (most, most)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


FOREIGN = '''# -*- coding: utf-8 -*-
"""Ümläute."""

def greet(name):
    """Größe."""
    # für alle
    word = "Grüße"  # ß
    return f"{word}, {name} \\u00e9 \\\\ü 😀"

if __name__ == "__main__":
    print(greet("Welt"))

greet("Zoë")
'''


def test_what_is_not_ascii_stands_as_escapes(tmp_path):
    (example,) = read_functions(write(tmp_path, FOREIGN), 4000)
    assert example.line == 13
    assert example.source.isascii()
    assert "# f\\xfcr alle" in example.source
    assert 'word = "Gr\\xfc\\xdfe"  # \\xdf' in example.source
    value = json.loads(example.frames[-1].value)
    assert value == repr("Grüße, Zoë é \\ü 😀")
    assert "__name__" not in example.source


def test_how_long_a_row_has_to_be(tmp_path):
    """The number that is told is enough, and one less is not."""
    path = write(tmp_path, "def f(n):\n    s = 'abc' * n\n    return s\nf(300)\n")
    with pytest.raises(tasks.UsageError) as error:
        tasks.create_task("code_trace", path=path, test_path=path, seq_len=512)
    needed = int(re.search(r"take ([\d,]+) tokens", str(error.value))[1].replace(",", ""))
    assert tasks.create_task("code_trace", path=path, test_path=path, seq_len=needed)
    with pytest.raises(tasks.UsageError, match=f"take {needed:,} tokens, more than seq_len={needed - 1}"):
        tasks.create_task("code_trace", path=path, test_path=path, seq_len=needed - 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no example call"),
        ("def f(x):\n    return x\n", "holds no example call"),
        ("def f(x):\n    return x\ng(1)\n", "mine.py:3: a call of g, which is no function of this file"),
        ("def f(x:\n    return x\n", "mine.py:1: "),
        ("if True:\n    pass\n", "mine.py:1: a statement that has no place"),
        ("def main():\n    return 1\nmain()\n", "mine.py:1: main is the name of the entry"),
        ("def f(é):\n    return é\nf(1)\n", "mine.py:1: '.xe9' in a name, or between names: only strings and comments"),
        ("def f(x):\n    return r'é'\nf(1)\n", "mine.py:2: '.xe9' in a raw string: only strings and comments"),
        ("def f(x):\n    return '\\é'\nf(1)\n", "mine.py:2: '.xe9' in a string, behind a backslash"),
        ("def f(x):\n    return b'é'\nf(1)\n", "mine.py:2: '.xe9' in bytes: only strings and comments"),
        ("def f(x):\n    return x\n\f\nf(1)\n", "mine.py:3: '.x0c' has no place in a program"),
        ("X = 1 / 0\ndef f():\n    return X\nf()\n", "mine.py:4: ZeroDivisionError: division by zero"),
        ("def f(x):\n    return x\nf(nothing)\n", None),
        ("def f(x):\n    s = 'abc' * x\n    return s\nf(300)\n", "mine.py:4: f.300. and its trace take 2,977 tokens"),
        (
            "def f(n):\n    s = 'abc' * n\n    return s\nf(300)\nf(1)\nf(999)\nprint(1)\n",
            "f.300. and .* leave the call out; 2 more calls cannot be used either, at 6, 7; the longest that was"
            " measured takes 9,268 tokens",
        ),
        ("def f(x):\n    return x\nif __name__ == '__main__' or 1:\n    f(1)\n", "mine.py:3: a statement that has no"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    path = write(tmp_path, text)
    if message is None:  # the program's own error is part of its trace
        assert read_functions(path, 512)[0].frames[-1].value == '"NameError"'
        return
    with pytest.raises(tasks.UsageError, match=message) as error:
        read_functions(path, 512)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer": "finale"}, "Did you mean 'final'"),
        ({"seq_len": 8}, "seq_len=8"),
        ({"max_statements": 0}, "max_statements=0"),
        ({"max_value": 0}, "max_value=0"),
        ({"max_depth": -1}, "max_depth=-1"),
        ({"loops": 1}, "loops=1"),
        ({"test_path": "missing.py"}, "missing.py cannot be read: there is no such file"),
        ({"path": "x.py", "loops": False}, "loops steers the generator"),
        ({"path": "missing.py"}, "missing.py cannot be read: there is no such file"),
        ({"path": "."}, "[.] cannot be read: it is no file but a folder"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(tasks.UsageError, match=message) as error:
        task(**options)
    assert "\n" not in str(error.value)


def test_rows_too_short_for_any_program():
    with pytest.raises(tasks.UsageError, match="fits seq_len=64") as error:
        task(seq_len=64).sample(1, split="train", seed=0)
    assert "\n" not in str(error.value)
