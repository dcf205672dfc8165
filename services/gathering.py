"""Adaptive batching: what is asked in one turn of the event loop is answered together.

A network's pass over one session costs about as much as over ten. Nobody is waited for: who asks while a pass is
computed is answered by the next one, and who asks alone is answered at once.
"""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)
QuestionT = TypeVar("QuestionT")
AnswerT = TypeVar("AnswerT")
#: Questions of one pass, so that no pass keeps the event loop for long; a call's own ones stay together.
MOST = 32


class _Call(NamedTuple, Generic[QuestionT, AnswerT]):
    questions: Sequence[QuestionT]
    answers: "asyncio.Future[Sequence[AnswerT]]"


class Gathering(Generic[KeyT, QuestionT, AnswerT]):
    """Answers calls in passes.

    Args:
        answer: one answer to each question; those of one key are answered together.
    """

    def __init__(self, answer: Callable[[KeyT, Sequence[QuestionT]], Sequence[AnswerT]]) -> None:
        self._answer = answer
        self._waiting: dict[KeyT, list[_Call[QuestionT, AnswerT]]] = {}

    async def ask(self, key: KeyT, questions: Sequence[QuestionT]) -> Sequence[AnswerT]:
        """Answers to the questions, in their order; an error of `answer` concerns the call that causes it alone."""
        loop = asyncio.get_running_loop()
        call: _Call[QuestionT, AnswerT] = _Call(questions, loop.create_future())
        if key not in self._waiting:
            self._waiting[key] = []
            # After all that can be read by now.
            loop.call_soon(self._pass, key)
        self._waiting[key].append(call)
        return await call.answers

    def _pass(self, key: KeyT) -> None:
        waiting = [call for call in self._waiting.pop(key) if not call.answers.done()]
        n_questions, n_calls = 0, 0
        for call in waiting:
            n_questions += len(call.questions)
            if n_calls and n_questions > MOST:
                break
            n_calls += 1
        if left := waiting[n_calls:]:
            self._waiting[key] = left
            asyncio.get_running_loop().call_soon(self._pass, key)
        self._answer_calls(key, waiting[:n_calls])

    def _answer_calls(self, key: KeyT, calls: Sequence[_Call[QuestionT, AnswerT]]) -> None:
        try:
            answers = iter(self._answer(key, [question for call in calls for question in call.questions]))
        except Exception as error:  # whatever it is, nobody may be left waiting
            if len(calls) == 1:
                calls[0].answers.set_exception(error)
            else:
                for call in calls:
                    self._answer_calls(key, [call])
            return
        for call in calls:
            call.answers.set_result([next(answers) for _ in call.questions])
