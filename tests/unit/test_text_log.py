"""Text logs that know their rank: who speaks, where it goes, and what is left alone."""

from __future__ import annotations

import copy
import io
import logging
import logging.config
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import textwrap
import threading
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logsync.workers import get_logger
from logsync.workers.launch import Launched, own_rank

LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40}


@pytest.fixture
def name() -> str:
    return f"test.{uuid.uuid4().hex}"


def launch(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


class FakeDistributed(types.ModuleType):
    """torch.distributed as far as a rank is asked for; the real one is in tests/jobs."""

    rank: int | None = None

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return self.rank is not None

    def get_rank(self) -> int:
        assert self.rank is not None
        return self.rank

    def get_world_size(self) -> int:
        return 4


@pytest.fixture
def distributed(monkeypatch: pytest.MonkeyPatch) -> FakeDistributed:
    module = FakeDistributed("torch.distributed")
    monkeypatch.setitem(sys.modules, "torch.distributed", module)
    return module


def spoken(logger: logging.Logger, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Say something at every level; return the levels that arrived at the root's handlers."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        for level in LEVELS.values():
            logger.log(level, "said at %s", level)
    return [record.levelname for record in caplog.records]


# Who speaks


@pytest.mark.parametrize(("rank", "heard"), [(0, list(LEVELS)), (1, ["WARNING", "ERROR"]), (7, ["WARNING", "ERROR"])])
def test_info_and_below_come_from_rank_0_and_warnings_from_every_rank(
    name: str, rank: int, heard: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launch(monkeypatch, rank, 8)

    assert spoken(get_logger(name), caplog) == heard
    assert spoken(get_logger(name, all_ranks=True), caplog) == list(LEVELS)


@pytest.mark.parametrize(
    ("text", "chosen"),
    [("all", {0, 1, 2, 3}), (" ALL ", {0, 1, 2, 3}), ("0,3", {0, 3}), (" 2 ", {2}), ("1 , 2,9", {1, 2}), ("", {0})],
)
def test_the_environment_has_the_last_word(
    name: str, text: str, chosen: set[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOGSYNC_LOG_RANKS", text)
    for rank in range(4):
        launch(monkeypatch, rank, 4)

        assert ("INFO" in spoken(get_logger(name), caplog)) == (rank in chosen)
        assert ("INFO" in spoken(get_logger(name, all_ranks=True), caplog)) == (rank in chosen or not text)


@pytest.mark.parametrize("text", ["some", "1-3", "-1", "0,", "0;3", "9" * 5000, "\u0663"])
def test_an_environment_that_makes_no_sense_is_told_once_by_rank_0_and_ignored(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOGSYNC_LOG_RANKS", text)
    told = []
    for rank in (1, 0):
        launch(monkeypatch, rank, 4)
        logger = get_logger(f"{name}{rank}")
        for _ in range(3):
            caplog.clear()
            with caplog.at_level(logging.INFO):
                logger.info("hello")
            told += [record.message for record in caplog.records if record.name == "logsync.workers.text_log"]
            assert [r.message for r in caplog.records if r.name == logger.name] == ["hello"] * (rank == 0)

    assert len(told) == 1
    assert told[0].startswith("LOGSYNC_LOG_RANKS=")
    assert len(told[0]) < 300


# Which rank


def test_a_record_has_the_rank_and_the_world_size_of_the_launcher(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launch(monkeypatch, 3, 8)
    get_logger(name).warning("careful", extra={"mine": 5})

    (record,) = caplog.records
    fields = vars(record)
    assert (fields["rank"], fields["world_size"], fields["mine"]) == (3, 8, 5)
    assert (record.name, record.filename, record.funcName) == (
        name,
        Path(__file__).name,
        sys._getframe().f_code.co_name,
    )


def test_fields_that_the_user_gives_win(name: str, caplog: pytest.LogCaptureFixture) -> None:
    get_logger(name).warning("careful", extra={"rank": "mine"})

    assert vars(caplog.records[0])["rank"] == "mine"


@pytest.mark.parametrize(
    "environ", [{}, {"RANK": "1"}, {"RANK": "x", "WORLD_SIZE": "y"}, {"RANK": "5", "WORLD_SIZE": "2"}]
)
def test_where_nothing_says_a_rank_there_is_one_process(
    name: str, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    with caplog.at_level(logging.INFO):
        get_logger(name).info("hello")

    fields = vars(caplog.records[0])
    assert (fields["rank"], fields["world_size"]) == (0, 1)


def test_a_logger_made_at_import_learns_its_rank_when_the_process_group_comes_and_keeps_it(
    name: str, distributed: FakeDistributed, caplog: pytest.LogCaptureFixture
) -> None:
    logger = get_logger(name)
    before = spoken(logger, caplog)
    distributed.rank = 2
    during = spoken(logger, caplog)
    places = {(vars(record)["rank"], vars(record)["world_size"]) for record in caplog.records}
    distributed.rank = None  # destroy_process_group()
    after = spoken(logger, caplog)

    assert before == list(LEVELS)
    assert during == after == ["WARNING", "ERROR"]
    assert places == {(2, 4)}


def test_torch_distributed_knows_better_than_the_environment(
    distributed: FakeDistributed, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(monkeypatch, 0, 8)
    assert own_rank() == Launched("torchrun", 0, 8)

    distributed.rank = 3
    assert own_rank() == Launched("torch.distributed", 3, 4)


def test_a_torch_that_is_half_imported_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed", types.ModuleType("torch.distributed"))

    assert own_rank() is None


# Levels, handlers, filters: as logging has them


@pytest.mark.parametrize("place", ["root", "parent", "named", "own"])
def test_a_level_holds_wherever_it_is_set_and_whenever(name: str, place: str, caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger(name)
    assert not logger.isEnabledFor(logging.INFO)  # pytest's handlers are on the root logger, whose level is WARNING
    target = {"root": logging.getLogger(), "parent": logging.getLogger("test"), "own": logger}
    set_on = target.get(place, logging.getLogger(name))
    before = set_on.level
    try:
        for level in (logging.INFO, logging.ERROR, logging.DEBUG):
            set_on.setLevel(level)
            assert logger.isEnabledFor(level)
            assert not logger.isEnabledFor(level - 1)
            caplog.clear()
            logger.log(level, "loud enough")
            logger.log(level - 1, "too low")
            assert caplog.messages == ["loud enough"]
    finally:
        set_on.setLevel(before)


def test_what_logging_disables_stays_silent(name: str, caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger(name)
    logging.disable(logging.WARNING)
    try:
        logger.warning("no")
    finally:
        logging.disable(logging.NOTSET)
    logging.getLogger(name).disabled = True  # what logging.config does to loggers that it does not know
    logger.warning("no")
    logging.getLogger(name).disabled = False
    logger.warning("yes")

    assert caplog.messages == ["yes"]


def test_handlers_of_the_named_logger_get_each_record_once_and_propagate_is_heeded(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(rank)s of %(world_size)s: %(message)s"))
    logging.getLogger(name).addHandler(handler)
    logging.getLogger(name).propagate = False

    get_logger(name).warning("careful")

    assert stream.getvalue() == "0 of 1: careful\n"
    assert not caplog.records


def test_a_filter_of_the_named_logger_holds(name: str, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger(name).addFilter(lambda record: "secret" not in record.getMessage())

    get_logger(name).warning("a secret")
    get_logger(name).warning("no harm")

    assert caplog.messages == ["no harm"]


def test_other_loggers_are_left_as_they_were(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def standing(logger: logging.Logger) -> tuple[Any, ...]:
        return logger.level, list(logger.handlers), list(logger.filters), logger.propagate, logger.disabled

    others = [logging.getLogger(), logging.getLogger("test"), logging.getLogger(name), logging.getLogger("logsync")]
    before = [standing(logger) for logger in others]
    get_logger(name, all_ranks=True).warning("careful")
    get_logger(name).setLevel(logging.DEBUG)
    get_logger(name).addHandler(logging.NullHandler())

    assert [standing(logger) for logger in others] == before
    assert type(logging.getLogger(name)) is logging.Logger
    assert capsys.readouterr().err == ""  # pytest has configured handlers, so there is no line of ours


def test_the_same_arguments_give_the_same_logger_and_others_another(name: str, tmp_path: Path) -> None:
    logger = get_logger(name)

    assert logger is get_logger(name)
    assert len({logger, get_logger(name, all_ranks=True), get_logger(name, directory=tmp_path)}) == 3
    assert get_logger(name, directory=str(tmp_path)) is get_logger(name, directory=tmp_path)


def test_a_child_has_its_parents_options(name: str, tmp_path: Path) -> None:
    child = get_logger(name, all_ranks=True, directory=tmp_path).getChild("sub")

    assert child is get_logger(f"{name}.sub", all_ranks=True, directory=tmp_path)


def test_a_logger_that_is_copied_or_sent_to_another_process_is_found_there_again(name: str, tmp_path: Path) -> None:
    logger = get_logger(name, all_ranks=True, directory=tmp_path)

    assert pickle.loads(pickle.dumps(logger)) is logger  # noqa: S301 - ours
    assert copy.deepcopy({"logger": logger})["logger"] is logger


@pytest.mark.parametrize(("given", "error"), [("", ValueError), (None, TypeError), (3, TypeError), (b"x", TypeError)])
def test_what_names_no_logger_is_refused(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="name"):
        get_logger(given)


# Nobody has configured logging: fresh interpreters, since pytest has


def bare(script: str, **environ: str) -> str:
    """What a script says on stderr, times left out."""
    ran = subprocess.run(
        [sys.executable, "-c", "import logging\nfrom logsync.workers import get_logger\n" + textwrap.dedent(script)],
        check=True, capture_output=True, text=True, timeout=60, env={**os.environ, **environ},
    )  # fmt: skip
    assert ran.stdout == ""
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", "TIME", ran.stderr)


def test_in_a_bare_script_info_is_a_line_on_stderr_until_logging_is_configured_and_never_two() -> None:
    said = bare("""
        log = get_logger("train")
        log.debug("0")
        log.info("1 %s", "a")
        log.error("2")
        assert not logging.getLogger().handlers and not logging.getLogger("train").handlers
        logging.basicConfig(level=logging.INFO, format="configured %(message)s")
        log.info("3")
        log.error("4")
    """)

    assert said.splitlines() == ["TIME INFO train: 1 a", "TIME ERROR train: 2", "configured 3", "configured 4"]


def test_in_a_bare_script_a_line_names_the_rank_and_only_rank_0_informs() -> None:
    script = """
        get_logger("train").info("epoch 1")
        get_logger("train").warning("slow\\n  disk")
    """

    assert bare(script, RANK="0", WORLD_SIZE="2").splitlines()[0] == "TIME INFO [rank 0 of 2] train: epoch 1"
    assert bare(script, RANK="1", WORLD_SIZE="2") == "TIME WARNING [rank 1 of 2] train: slow\n  disk\n"


def test_in_a_bare_script_a_level_that_was_set_counts() -> None:
    said = bare("""
        log = get_logger("app.train")
        log.setLevel(logging.DEBUG)
        log.debug("1")
        log.setLevel(logging.NOTSET)
        logging.getLogger("app").setLevel(logging.ERROR)
        log.warning("no")
        logging.getLogger("app").setLevel(logging.NOTSET)
        logging.getLogger().setLevel(logging.ERROR)
        log.warning("no")
        log.error("2")
    """)

    assert said.splitlines() == ["TIME DEBUG app.train: 1", "TIME ERROR app.train: 2"]


def test_who_takes_loggings_last_resort_away_gets_silence_and_no_stderr_is_no_error() -> None:
    said = bare("""
        import sys
        stderr, sys.stderr = sys.stderr, None
        get_logger("train").warning("into the void")
        sys.stderr = stderr
        logging.lastResort = None
        get_logger("train").error("no")
    """)

    assert "no\n" not in said.replace("No handlers could be found", "")
    assert "Traceback" not in said


def test_a_traceback_follows_its_line() -> None:
    said = bare("""
        try:
            1 / 0
        except ZeroDivisionError:
            get_logger("train").exception("it broke")
    """)

    assert said.startswith("TIME ERROR train: it broke\nTraceback (most recent call last):\n")
    assert said.endswith("ZeroDivisionError: division by zero\n")


def test_a_logger_does_not_import_torch() -> None:
    assert bare("import sys; get_logger('x').info('1'); assert 'torch' not in sys.modules") == "TIME INFO x: 1\n"


# Files


def lines(path: Path) -> list[str]:
    return [line.split(" ", 2)[2] for line in path.read_text().splitlines()]


def test_every_ranks_records_go_to_its_own_file_and_handlers_get_what_they_got_before(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run" / "text"
    logger = get_logger(name, directory=folder)
    for rank in range(2):
        launch(monkeypatch, rank, 2)
        logger.debug("too low")
        logger.info("step %d", 3)
        logger.warning("careful")

    assert sorted(path.name for path in folder.iterdir()) == ["rank0.log", "rank1.log"]
    for rank in range(2):
        assert lines(folder / f"rank{rank}.log") == [
            f"INFO [rank {rank} of 2] {name}: step 3",
            f"WARNING [rank {rank} of 2] {name}: careful",
        ]
    assert caplog.messages == ["careful", "careful"]  # pytest's handlers, on a root logger of level WARNING


def test_a_file_gets_what_the_level_that_was_set_lets_through(name: str, tmp_path: Path) -> None:
    logger = get_logger(name, directory=tmp_path)
    for level in ("ERROR", "DEBUG"):
        logging.getLogger(name).setLevel(level)
        logger.debug("debug at %s", level)
        logger.warning("warning at %s", level)

    assert lines(tmp_path / "rank0.log") == [f"DEBUG {name}: debug at DEBUG", f"WARNING {name}: warning at DEBUG"]


def test_loggers_share_a_file_and_a_restart_appends(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest would keep the half of a pair for its report, which several workers cannot pass on.
    monkeypatch.setattr(logging.getLogger(name), "propagate", False)
    (tmp_path / "rank0.log").write_text("a b before\n")
    get_logger(name, directory=tmp_path).warning("one")
    get_logger(f"{name}.sub", directory=tmp_path).warning("two \ud800 \u20ac")

    said = lines(tmp_path / "rank0.log")
    assert said[0] == "before"
    assert [line.split(": ")[1] for line in said[1:]] == ["one", "two \\ud800 \u20ac"]


def test_a_relative_folder_stays_where_it_was_when_the_script_changes_its_directory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    logger = get_logger(name, directory="text")
    monkeypatch.chdir(tmp_path / "elsewhere")
    logger.warning("careful")

    assert lines(tmp_path / "text" / "rank0.log") == [f"WARNING {name}: careful"]


def test_a_file_that_cannot_be_opened_is_told_once_and_the_record_goes_on(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    logger = get_logger(name, directory=tmp_path / "file" / "text")
    for _ in range(3):
        logger.warning("careful")

    assert [message for message in caplog.messages if "cannot open" not in message] == ["careful"] * 3
    assert len(caplog.messages) == 4


def test_a_full_disk_is_told_once_and_the_records_go_on(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rank0.log").symlink_to("/dev/full")
    logger = get_logger(name, directory=tmp_path)
    for _ in range(3):
        logger.warning("careful")

    assert [message for message in caplog.messages if "cannot write" not in message] == ["careful"] * 3
    assert len(caplog.messages) == 4
    assert "Traceback" not in capsys.readouterr().err


def test_threads_that_begin_together_lose_no_line(name: str, tmp_path: Path) -> None:
    begin = threading.Barrier(8)

    def run(number: int) -> None:
        begin.wait()
        for _ in range(50):
            get_logger(name, directory=tmp_path).warning("from %d", number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    said = lines(tmp_path / "rank0.log")
    assert [said.count(f"WARNING {name}: from {number}") for number in range(8)] == [50] * 8


@pytest.mark.parametrize(
    "start", [multiprocessing.get_context("fork").Process, multiprocessing.get_context("spawn").Process]
)
def test_a_logger_works_in_a_forked_and_in_a_spawned_child(
    name: str, start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(monkeypatch, 1, 2)
    logger = get_logger(name, directory=tmp_path)
    logger.info("before")
    child = start(target=logger.warning, args=("from a child",))
    child.start()
    child.join(30)

    assert child.exitcode == 0
    assert lines(tmp_path / "rank1.log") == [
        f"INFO [rank 1 of 2] {name}: before",
        f"WARNING [rank 1 of 2] {name}: from a child",
    ]
