"""Countdown with a scratchpad: three numbers make a target, after attempts that may miss it.

An expression is two steps: two of the numbers are combined, then the result with the third, by `+`, `-` or `*` with
results in 0..99. Written with the larger operand first, an expression is canonical under commutation and counts as one
solution; so `(3 + 4) + 5` and `(3 + 5) + 4` are two. The scratchpad between `<think>` and `</think>` holds the steps of
up to two attempts that miss, and of the one that hits. The answer after it repeats that one; the verifier reads only
the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations_with_replacement

import torch

from lab.puzzles.puzzle import Instance, Puzzle, Solution, Twin, body_of, ended
from lab.puzzles.vocabulary import (
    ANSWER,
    BOS,
    COUNTDOWN,
    EQUALS,
    LARGEST_NUMBER,
    NEXT_ATTEMPT,
    NEXT_STEP,
    NUMBER,
    OPERATORS,
    PAD,
    THINK_BEGIN,
    THINK_END,
)
from proxytune.demo.holdout import countdown_key, split_of

__all__ = ["LARGEST_GIVEN", "MISSES", "Scratchpad"]

LARGEST_GIVEN = 9
MISSES = 2
"""Most attempts that miss in a training text."""
_STEPS = 11
"""Tokens of two steps: three numbers, an operator and `=` each, and a separator."""
_PAIRS = torch.tensor([(0, 1, 2), (0, 2, 1), (1, 2, 0)])  # the two combined first, and the third
_CODE_BASE = LARGEST_NUMBER + 1
_NONE = _CODE_BASE**4 * len(OPERATORS) ** 2
"""Larger than any code; stands for an expression that is impossible or a repeat."""


class Scratchpad(Puzzle):
    """Countdown with three numbers of 1..9; an instance is the numbers, in the order of the prompt, and the target."""

    name = "countdown"
    prompt_length = 7
    answer_length = (MISSES + 1) * (_STEPS + 1) + 1 + _STEPS + 1

    def propose(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Random numbers, with the value of one of their expressions as target, `[N, 4]` int64."""
        numbers = torch.randint(1, LARGEST_GIVEN + 1, (count, 3), generator=generator)
        codes = _codes(numbers)
        drawn = torch.multinomial((codes < _NONE).float(), 1, generator=generator)
        return torch.cat([numbers, _values(codes.gather(1, drawn))], 1)

    def key(self, instance: Instance) -> str:
        """The numbers, in any order, and the target, as in the lab's other Countdown."""
        return countdown_key(instance[:3], instance[3])

    def solved_by(self, instances: torch.Tensor) -> torch.Tensor:
        """Which expressions have the value of the target, `[N, 27]` bool, ordered by the numbers in them."""
        codes = _codes(instances[:, :3])
        return (codes < _NONE) & (_values(codes) == instances[:, 3:])

    def written(self, instances: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        """The two steps, larger operands first, `[N, 11]` int64."""
        return _steps(_codes(instances[:, :3]).gather(1, choice[:, None])[:, 0])

    def prompts(self, instances: torch.Tensor) -> torch.Tensor:
        """The numbers and the target, `[N, 7]` int64."""
        column = instances.new_ones(len(instances), 1)
        return torch.cat([BOS * column, COUNTDOWN * column, NUMBER + instances, ANSWER * column], 1)

    def answers(self, instances: torch.Tensor, twin: Twin, generator: torch.Generator) -> torch.Tensor:
        """Scratchpad and answer, `[N, 49]` int64, with the end of text, padded on the right.

        The varied twin's number of misses is uniform in 0..2, each a random expression. The collapsed twin has none, so
        its text is a function of the instance. A miss never is the solution of a held-out instance.
        """
        hits = self.written(instances, self.chosen(instances, twin, generator))
        tail = ended(_led_by(THINK_END, hits))
        if twin == "collapsed":
            return _padded(torch.cat([_led_by(THINK_BEGIN, hits), tail], 1), self.answer_length)
        codes = _codes(instances[:, :3])
        values = _values(codes)
        sorted_numbers = instances[:, :3].sort(1).values
        taught = _taught_values()[tuple(sorted_numbers.T)].gather(1, values.clamp(max=LARGEST_NUMBER))  # [N, 27]
        allowed = (codes < _NONE) & (values != instances[:, 3:]) & taught
        most = torch.where(allowed.any(1), MISSES, 0)
        misses = (torch.rand(len(instances), generator=generator) * (most + 1)).long()  # [N], uniform in 0..most
        drawn = torch.multinomial(
            torch.where(allowed.any(1, keepdim=True), allowed, codes < _NONE).float(),
            MISSES,
            replacement=True,
            generator=generator,
        )  # [N, misses]
        attempts = [_steps(codes.gather(1, drawn[:, [number]])[:, 0]) for number in range(MISSES)] + [hits]
        rows = torch.full((len(instances), self.answer_length), PAD)
        for count in range(MISSES + 1):  # rows with equally many misses have equal lengths
            taken = misses == count
            used = [*attempts[:count], hits]
            marks = [THINK_BEGIN] + [NEXT_ATTEMPT] * count
            thought = [_led_by(mark, steps[taken]) for mark, steps in zip(marks, used, strict=True)]
            rows[taken] = _padded(torch.cat([*thought, tail[taken]], 1), self.answer_length)
        return rows

    def read(self, instance: Instance, ids: Sequence[int]) -> Solution | None:
        """The steps after the scratchpad, larger operands first, if they use every number once and hit the target."""
        body = body_of(ids)
        if body is None or body[:1] != [THINK_BEGIN] or body.count(THINK_END) != 1:
            return None
        answer = body[body.index(THINK_END) + 1 :]
        if len(answer) != _STEPS or answer[5] != NEXT_STEP:
            return None
        first, second = _read_step(answer[:5]), _read_step(answer[6:])
        if first is None or second is None:
            return None
        left = Counter(instance[:3])
        left.subtract(first[:2])
        left.update([first[2]])
        left.subtract(second[:2])
        if any(left.values()) or second[2] != instance[3]:
            return None
        return (*_larger_first(answer[:5]), NEXT_STEP, *_larger_first(answer[6:]))


def _codes(numbers: torch.Tensor) -> torch.Tensor:
    """All expressions of three numbers, `[N, 3]` to `[N, 27]`, sorted, each once; `_NONE` fills up.

    The digits of a code are the operands and operators, so equal codes are equal texts.
    """
    a, b, third = (numbers[:, _PAIRS[:, place]] for place in range(3))  # [N, 3] each
    first, second = torch.arange(len(OPERATORS))[:, None, None], torch.arange(len(OPERATORS))[:, None]
    a, b, third = (part[:, None, None] for part in (a, b, third))  # [N, 1, 1, 3]; operators broadcast over the ones
    result = _apply(first, a, b)
    code = torch.maximum(a, b) * _CODE_BASE + torch.minimum(a, b)
    code = (code * len(OPERATORS) + first) * _CODE_BASE + torch.maximum(result, third)
    code = (code * _CODE_BASE + torch.minimum(result, third)) * len(OPERATORS) + second
    possible = (result <= LARGEST_NUMBER) & (_apply(second, result, third) <= LARGEST_NUMBER)
    codes = torch.where(possible, code, _NONE).flatten(1).sort(1).values
    codes[:, 1:][codes[:, 1:] == codes[:, :-1]] = _NONE
    return codes.sort(1).values


def _apply(operator: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The result of a step, with the larger operand first; operators are indices into `OPERATORS`."""
    return torch.where(operator == 0, left + right, torch.where(operator == 1, (left - right).abs(), left * right))


def _operations(codes: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Larger operand, operator, smaller operand and result of both steps of each expression."""
    rest, second = codes // len(OPERATORS), codes % len(OPERATORS)
    rest, low = rest // _CODE_BASE, rest % _CODE_BASE
    rest, high = rest // _CODE_BASE, rest % _CODE_BASE
    rest, first = rest // len(OPERATORS), rest % len(OPERATORS)
    a, b = rest // _CODE_BASE, rest % _CODE_BASE
    return (a, first, b, _apply(first, a, b)), (high, second, low, _apply(second, high, low))


def _values(codes: torch.Tensor) -> torch.Tensor:
    """The value of each expression; 0 for `_NONE`."""
    return _operations(codes)[1][3]


def _steps(codes: torch.Tensor) -> torch.Tensor:
    """Token ids of expressions, `[N]` to `[N, 11]`."""
    written = []
    for high, operator, low, result in _operations(codes):
        equals = torch.full_like(high, EQUALS)
        written.append(torch.stack([NUMBER + high, OPERATORS[0] + operator, NUMBER + low, equals, NUMBER + result], 1))
    return torch.cat([written[0], _led_by(NEXT_STEP, written[1])], 1)


@lru_cache(maxsize=1)
def _taught_values() -> torch.Tensor:
    """Whether three ascending numbers and a value are a training instance, `[10, 10, 10, 100]` bool."""
    table = torch.zeros(*[LARGEST_GIVEN + 1] * 3, LARGEST_NUMBER + 1, dtype=torch.bool)
    for numbers in combinations_with_replacement(range(1, LARGEST_GIVEN + 1), 3):
        taught = [split_of(countdown_key(numbers, value)) == "train" for value in range(LARGEST_NUMBER + 1)]
        table[numbers] = torch.tensor(taught)
    return table


def _read_step(ids: Sequence[int]) -> tuple[int, int, int] | None:
    """Both operands and the result of a correct step; None for any other five ids."""
    left, right, result = (ids[place] - NUMBER for place in (0, 2, 4))
    if not all(0 <= number <= LARGEST_NUMBER for number in (left, right, result)):
        return None
    if ids[1] not in OPERATORS or ids[3] != EQUALS:
        return None
    value = (left + right, left - right, left * right)[OPERATORS.index(ids[1])]
    return (left, right, result) if value == result else None


def _larger_first(ids: Sequence[int]) -> tuple[int, ...]:
    """A step with its larger operand first; only sums and products can have been the other way round."""
    return (max(ids[0], ids[2]), ids[1], min(ids[0], ids[2]), *ids[3:])


def _led_by(token: int, steps: torch.Tensor) -> torch.Tensor:
    """Rows with a token put in front."""
    return torch.cat([steps.new_full((len(steps), 1), token), steps], 1)


def _padded(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Rows padded on the right."""
    return torch.nn.functional.pad(rows, (0, length - rows.shape[1]), value=PAD)
