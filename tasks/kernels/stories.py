"""Stories of people who move about, take things and drop them, in compiled loops."""

from __future__ import annotations

import numpy as np

from zoo.tasks.kernels.random import below, compiled, word

WENT, TOOK, DROPPED = 0, 1, 2
PERSON, THING, BEFORE, COUNT, LIST = 0, 1, 2, 3, 4
"""Questions: where a person is, where a thing is, where it was before, how many things someone holds, and which."""
_MOST_TRIES = 10_000


@compiled
def tell(keys, sizes, question, people, places, things, facts, needed, asked, answers):
    """Fill each row of zeroed arrays with a story, drawn again until the question has an answer.

    Args:
        keys: (n,) one for each row.
        sizes: (n,) facts of each story.
        question: one of the five.
        people, places, things: how many there are.
        facts: (n, m, 3) person, action, and place or thing.
        needed: (n, m) whether the answer takes the fact.
        asked: (n, 2) person or thing that the question is about, and for BEFORE where it is now.
        answers: (n, 1 + things) how many answers there are, then places, a count or things in the order of taking.

    Returns whether every row found a story.
    """
    state = np.empty(1, dtype=np.uint64)
    at, moved = np.empty(people, dtype=np.int64), np.empty(people, dtype=np.int64)
    holder, taken = np.empty(things, dtype=np.int64), np.empty(things, dtype=np.int64)
    # Of each thing, the last two known places and the facts that brought it there.
    now, came = np.empty(things, dtype=np.int64), np.empty(things, dtype=np.int64)
    before, came_before = np.empty(things, dtype=np.int64), np.empty(things, dtype=np.int64)
    allowed = np.empty(max(people, things), dtype=np.int64)
    for i in range(len(keys)):
        state[0] = keys[i]
        tries = 0
        while True:
            at[:], moved[:], holder[:], taken[:] = -1, -1, -1, -1
            now[:], came[:], before[:], came_before[:] = -1, -1, -1, -1
            for t in range(sizes[i]):
                person = below(state, people)
                count = 0
                if question != PERSON and word(state) >> np.uint64(63):
                    for thing in range(things):
                        here = now[thing] == -1 or now[thing] == at[person]
                        held = holder[thing] == person and at[person] != -1
                        if held or (holder[thing] == -1 and here):
                            allowed[count] = thing
                            count += 1
                facts[i, t, 0] = person
                if count:
                    thing = allowed[below(state, count)]
                    facts[i, t, 2] = thing
                    if holder[thing] == person:
                        facts[i, t, 1] = DROPPED
                        holder[thing] = -1
                    else:
                        facts[i, t, 1] = TOOK
                        holder[thing] = person
                        taken[thing] = t
                        if now[thing] == -1 and at[person] != -1:
                            now[thing], came[thing] = at[person], moved[person]
                    continue
                place = below(state, places - (at[person] != -1))
                place += at[person] != -1 and place >= at[person]
                facts[i, t, 1], facts[i, t, 2] = WENT, place
                at[person], moved[person] = place, t
                for thing in range(things):
                    if holder[thing] == person:
                        before[thing], came_before[thing] = now[thing], came[thing]
                        now[thing], came[thing] = place, t
            count = 0
            if question in (THING, BEFORE):
                for thing in range(things):
                    if taken[thing] != -1 and (now if question == THING else before)[thing] != -1:
                        allowed[count] = thing
                        count += 1
            else:
                for person in range(people):
                    known = at[person] != -1
                    if question != PERSON:
                        known = (facts[i, : sizes[i], 0] == person).any()
                    if known:
                        allowed[count] = person
                        count += 1
            if count:
                break
            tries += 1
            if tries > _MOST_TRIES:
                return False
        subject = allowed[below(state, count)]
        asked[i, 0] = subject
        needed[i] = False
        answers[i, 0] = 1
        if question == PERSON:
            needed[i, moved[subject]] = True
            answers[i, 1] = at[subject]
        elif question == THING:
            needed[i, taken[subject]] = needed[i, came[subject]] = True
            answers[i, 1] = now[subject]
        elif question == BEFORE:
            needed[i, taken[subject]] = needed[i, came[subject]] = needed[i, came_before[subject]] = True
            asked[i, 1] = now[subject]
            answers[i, 1] = before[subject]
        else:
            for t in range(sizes[i]):
                needed[i, t] = facts[i, t, 0] == subject
            held = 0
            for thing in np.argsort(taken):
                if holder[thing] == subject:
                    held += 1
                    answers[i, held] = thing
            answers[i, 0] = held
            if question == COUNT:
                answers[i, 0], answers[i, 1] = 1, held
    return True
