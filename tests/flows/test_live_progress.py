import logging

import pytest

from flows.live_progress import live_progress
from flows.stage_store import progress_sink


def test_away_from_a_terminal_each_finished_stage_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with live_progress():
        progress = progress_sink.get()
        progress("split", "splitting", 0.5)
        progress("split", "done in 3 s", 1.0)
        progress("policy", "reused", 1.0)
    captured = capsys.readouterr()
    assert [line.split() for line in captured.err.splitlines()] == [
        ["split", "done", "in", "3", "s"],
        ["policy", "reused"],
    ]
    assert captured.out == ""


def test_in_a_terminal_each_stage_has_a_live_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with live_progress():
        progress_sink.get()("user-model", "pass 2 of 3", 0.5)
        progress_sink.get()("user-model", "pass 3 of 3", 1.0)
    shown = capsys.readouterr().err
    assert "user-model" in shown
    assert "pass 3 of 3" in shown


def test_after_the_block_progress_goes_where_it_went_before() -> None:
    before = progress_sink.get()
    with pytest.raises(RuntimeError), live_progress():
        assert progress_sink.get() is not before
        raise RuntimeError
    assert progress_sink.get() is before


def test_prefects_lines_of_a_run_stay_out_of_the_console(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Console(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.name)

    monkeypatch.setattr(logging.getLogger(), "handlers", [Console()])
    with live_progress():
        for name in ("prefect.task_runs", "prefect.flow_runs", "prefect.client", "shop"):
            logging.getLogger(name).error("a traceback")
    assert seen == ["prefect.client", "shop"]
