import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

import pytest

from services.gathering import MOST, Gathering


class Passes:
    """Answers n with 10 n, refuses 13, and remembers what was asked together."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[int]]] = []

    def answer(self, key: str, questions: Sequence[int]) -> list[int]:
        self.asked.append((key, list(questions)))
        if 13 in questions:
            raise ValueError("13")
        return [10 * question for question in questions]


def at_once(*calls: tuple[str, list[int]]) -> tuple[Passes, list[Any]]:
    passes = Passes()

    async def ask() -> list[Any]:
        gathering = Gathering(passes.answer)
        waiting: list[Awaitable[Any]] = [gathering.ask(key, questions) for key, questions in calls]
        return await asyncio.gather(*waiting, return_exceptions=True)

    return passes, asyncio.run(ask())


def test_who_asks_at_once_is_answered_together_in_order_and_each_key_by_itself() -> None:
    passes, answers = at_once(("a", [1]), ("b", [2, 3]), ("a", [4, 5]), ("a", []))
    assert answers == [[10], [20, 30], [40, 50], []]
    assert passes.asked == [("a", [1, 4, 5]), ("b", [2, 3])]


def test_a_pass_is_bounded_and_a_call_is_never_split() -> None:
    calls = [("a", list(range(100, 100 + n))) for n in (MOST - 1, 2, MOST + 5, 1)]
    passes, answers = at_once(*calls)
    assert [len(questions) for _, questions in passes.asked] == [MOST - 1, 2, MOST + 5, 1]
    assert answers == [[10 * question for question in questions] for _, questions in calls]


def test_an_error_concerns_the_call_that_causes_it_alone() -> None:
    _, answers = at_once(("a", [1]), ("a", [2, 13]), ("a", [3]))
    assert (answers[0], answers[2]) == ([10], [30])
    assert isinstance(answers[1], ValueError)


def test_who_asks_during_a_pass_is_answered_by_the_next_one() -> None:
    passes = Passes()

    async def ask() -> list[Sequence[int]]:
        gathering = Gathering(passes.answer)
        loop = asyncio.get_running_loop()
        first = loop.create_task(gathering.ask("a", [1]))
        while not passes.asked:
            await asyncio.sleep(0)
        return [await gathering.ask("a", [2]), await first]

    assert asyncio.run(ask()) == [[20], [10]]
    assert passes.asked == [("a", [1]), ("a", [2])]


def test_who_gave_up_is_not_asked_for() -> None:
    passes = Passes()

    async def ask() -> Sequence[int]:
        gathering = Gathering(passes.answer)
        gone = asyncio.create_task(gathering.ask("a", [1]))
        await asyncio.sleep(0)
        stays = asyncio.create_task(gathering.ask("a", [2]))
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        return await stays

    assert asyncio.run(ask()) == [20]
    assert [question for _, questions in passes.asked for question in questions] == [2]
