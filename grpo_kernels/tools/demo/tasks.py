"""Problems with a checkable answer, and the rules that score a completion. Pure Python, no model in sight."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Problem:
    question: str
    answer: int


@dataclass(frozen=True)
class Completion:
    text: str
    finished: bool  # the policy ended it itself; False: cut off at the token limit


@dataclass(frozen=True)
class Score:
    """Both in [0, 1], half of the reward each."""

    correct: float
    form: float

    @property
    def reward(self) -> float:
        return 0.5 * self.correct + 0.5 * self.form


class Task(Protocol):
    name: str
    rule: str  # one line, shown to the reader of the report

    def training(self, rng: random.Random) -> Iterator[Problem]:
        """Endless problems, none of them held out."""
        ...

    def held_out(self, count: int) -> list[Problem]:
        """The same problems every time, none of them in `training`."""
        ...

    def score(self, problem: Problem, completion: Completion) -> Score: ...


class Addition:
    """Say the sum as a bare equation: `14 + 5 = 19`, nothing before it, nothing after it."""

    name = "addition"
    rule = "0.5 if the last number is the sum, 0.5 if the whole answer is the equation `a + b = number`"

    def __init__(self, largest: int = 20):
        pairs = [(a, b) for a in range(1, largest + 1) for b in range(1, largest + 1)]
        self._held_out = [pair for pair in pairs if self._is_held_out(*pair)]
        self._training = [pair for pair in pairs if not self._is_held_out(*pair)]

    def training(self, rng: random.Random) -> Iterator[Problem]:
        while True:
            yield self._problem(*rng.choice(self._training))

    def held_out(self, count: int) -> list[Problem]:
        return [self._problem(*pair) for pair in random.Random(0).sample(self._held_out, count)]

    def score(self, problem: Problem, completion: Completion) -> Score:
        numbers = re.findall(r"\d+", completion.text)
        correct = bool(numbers) and int(numbers[-1]) == problem.answer
        equation = re.fullmatch(re.escape(problem.question) + r" = \d+", completion.text.strip())
        return Score(correct=float(correct), form=float(completion.finished and equation is not None))

    @staticmethod
    def _is_held_out(a: int, b: int) -> bool:
        return (a + 2 * b) % 5 == 0

    @staticmethod
    def _problem(a: int, b: int) -> Problem:
        return Problem(question=f"{a} + {b}", answer=a + b)


class CopyDigits:
    """Repeat the digits asked for, then stop: `3 1 4` and nothing more."""

    name = "copy digits"
    rule = "0.5 x share of the four places that are right (three digits, the end), 0.5 if it is three digits at all"
    length = 3

    def training(self, rng: random.Random) -> Iterator[Problem]:
        while True:
            number = rng.randrange(10**self.length)
            if not self._is_held_out(number):
                yield self._problem(number)

    def held_out(self, count: int) -> list[Problem]:
        numbers = [number for number in range(10**self.length) if self._is_held_out(number)]
        return [self._problem(number) for number in random.Random(0).sample(numbers, count)]

    def score(self, problem: Problem, completion: Completion) -> Score:
        wanted = [*self.digits(problem), "end"]
        given = completion.text.split() + (["end"] if completion.finished else [])
        right = sum(want == got for want, got in zip(wanted, given, strict=False))  # a place never reached is wrong
        form = completion.finished and re.fullmatch(rf"\d( \d){{{self.length - 1}}}", completion.text) is not None
        return Score(correct=right / len(wanted), form=float(form))

    @classmethod
    def digits(cls, problem: Problem) -> str:
        return f"{problem.answer:0{cls.length}d}"

    @staticmethod
    def _is_held_out(number: int) -> bool:
        return number % 7 == 0

    @classmethod
    def _problem(cls, number: int) -> Problem:
        return Problem(question="copy " + " ".join(f"{number:0{cls.length}d}"), answer=number)
