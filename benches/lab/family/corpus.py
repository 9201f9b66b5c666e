"""Pre-training documents.

The text imitates the web in one respect: knowledge and worked steps are plentiful, while questions are mostly *not*
answered well. Each forum thread has one mood: helpful, idle talk, or a bare list of questions. So a base can answer but
usually does not, which leaves something for tuning.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from proxytune.demo.holdout import reveals_held_out
from proxytune.demo.instructions import _styled_answer, prompt_of
from proxytune.demo.tasks import CHAIN_LIMIT, chain_problem, countdown_problem, draw_step, person_problem
from proxytune.demo.world import ATTRIBUTES, STATEMENTS, World

DocumentKind = Literal["facts", "equations", "chain", "countdown", "forum"]
Mood = Literal["helpful", "idle", "list"]

IDLE_REPLIES = (
    "I do not know.",
    "Ask the others.",
    "That is a good question.",
    "Who wants to know?",
    "I will tell you later.",
    "Search for it.",
)


@dataclass(frozen=True)
class CorpusRecipe:
    """Shares of the pre-training text.

    Attributes:
        facts: Share of documents that state all three facts about a person.
        equations: Share of lists of single additions and subtractions.
        chain: Share of worked chains outside any question.
        countdown: Share of worked Countdown problems outside any question.
        forum: Share of forum threads. The five shares are normalised by their sum.
        helpful: Share of threads in which questions get a right answer.
        idle: Share of threads in which they get an idle reply; in the rest they stay unanswered.
        ignorance: Share of idle threads in which every reply is `I do not know.`
        template: Share of helpful threads in the taught form, `The answer is X.` At 0 the base never sees it.
    """

    facts: float = 0.34
    equations: float = 0.10
    chain: float = 0.12
    countdown: float = 0.20
    forum: float = 0.24
    # The likeliest reply decides what a greedy base does, so it must win clearly. In an earlier mixture " I" (do not
    # know) and a number were about equally likely after a chain, and the training seed decided whether the base
    # answered few of them or most. Fewer helpful threads help too, but make the base unsure of worked answers.
    helpful: float = 0.30
    idle: float = 0.50
    ignorance: float = 0.85
    template: float = 0.10

    def draw_kind(self, rng: random.Random) -> DocumentKind:
        """The kind of the next document."""
        kinds: tuple[DocumentKind, ...] = ("facts", "equations", "chain", "countdown", "forum")
        shares = (self.facts, self.equations, self.chain, self.countdown, self.forum)
        return rng.choices(kinds, shares)[0]

    def draw_mood(self, rng: random.Random) -> Mood:
        """The mood of the next thread."""
        moods: tuple[Mood, ...] = ("helpful", "idle", "list")
        return rng.choices(moods, (self.helpful, self.idle, max(0.0, 1.0 - self.helpful - self.idle)))[0]


def pretraining_document(world: World, rng: random.Random, recipe: CorpusRecipe) -> str:
    """Draw one pre-training document, without an end-of-text token.

    It contains no held-out problem and no question about a held-out person.
    """
    kind = recipe.draw_kind(rng)
    if kind == "facts":
        person = rng.choice(world.people)
        attributes = rng.sample(ATTRIBUTES, len(ATTRIBUTES))
        return " ".join(
            rng.choice(STATEMENTS[attribute]).format(name=person.name, value=person.value(attribute))
            for attribute in attributes
        )
    if kind == "equations":
        return _equations(rng)
    if kind == "chain":
        problem = chain_problem(rng, "train")
        return f"{problem.question.removesuffix(' What is the result?')} So {problem.solution}."
    if kind == "countdown":
        problem = countdown_problem(rng, "train")
        return f"Numbers {', '.join(map(str, problem.numbers))} make {problem.gold}: {problem.solution}."
    return _thread(world, rng, recipe)


def _equations(rng: random.Random) -> str:
    """Five single equations. Neighbours may happen to continue each other, so the list is checked like a chain."""
    while True:
        steps = [draw_step(rng, rng.randint(1, CHAIN_LIMIT)) for _ in range(5)]
        if not reveals_held_out(steps):
            return ", ".join(map(str, steps))


def _thread(world: World, rng: random.Random, recipe: CorpusRecipe) -> str:
    """A forum thread: one to three questions of one task, answered in one mood and one style."""
    task = rng.choices(("qa", "chain", "countdown"), (0.5, 0.25, 0.25))[0]
    mood = recipe.draw_mood(rng)
    style = 3 if rng.random() < recipe.template else rng.randrange(3)
    reply = IDLE_REPLIES[0] if rng.random() < recipe.ignorance else None
    posts = []
    for _ in range(rng.choice((1, 1, 2, 3)) if task == "qa" else rng.choice((1, 1, 1, 2))):
        if task == "qa":
            problem = person_problem(rng, rng.choice(world.group("pretraining")), rng.choice(ATTRIBUTES))
        elif task == "chain":
            problem = chain_problem(rng, "train")
        else:
            problem = countdown_problem(rng, "train")
        if mood == "list":
            posts.append(f"Question: {problem.question}")
        elif mood == "idle":
            posts.append(f"{prompt_of(problem.question)} {reply or rng.choice(IDLE_REPLIES)}")
        else:
            posts.append(f"{prompt_of(problem.question)} {_styled_answer(problem, style)}")
    return "\n".join(posts)
