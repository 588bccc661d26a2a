"""The tree of errors: what each one is, and that it arrives as it left."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

from logsync.coordinator import errors
from logsync.coordinator.errors import (
    AgreedError,
    BadType,
    BadValue,
    ConfigError,
    LogsyncError,
    PeerLost,
    RoundTimeout,
    TransportError,
    agreed_error,
    kind_of,
    printable,
)
from logsync.coordinator.messages import error_of, failure_of

CLASSES = [c for name in errors.__all__ if isinstance(c := getattr(errors, name), type)]
AGREED = [c for c in CLASSES if issubclass(c, AgreedError) and c is not AgreedError]


def test_the_tree_is_the_one_that_is_drawn() -> None:
    drawn: dict[str, list[str]] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"    ([│ ]*(?:[├└]── )?)(\w+)(?: \((\w+)\))?", line):
            indent, name, builtin = match.groups()
            above[len(indent) // 4 :] = [name]
            drawn[name] = [*above[-2:-1], *([builtin] if builtin else [])]

    assert drawn.pop("LogsyncError") == []
    assert drawn == {c.__name__: [base.__name__ for base in c.__bases__] for c in CLASSES if c is not LogsyncError}


def test_a_builtin_base_catches_what_a_user_expects() -> None:
    pairs = [(ConfigError, ValueError), (BadValue, ValueError), (BadType, TypeError), (RoundTimeout, TimeoutError)]
    assert all(issubclass(ours, builtin) for ours, builtin in [*pairs, (PeerLost, ConnectionError)])
    assert not issubclass(TransportError, AgreedError)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_copies_and_pickles_keep_class_text_and_fields(cls: type[LogsyncError]) -> None:
    error = cls("rank 3 said no", ranks=(3, 5), call=7, step=2.5, round=9)

    for same in (copy.copy(error), pickle.loads(pickle.dumps(error))):  # noqa: S301 - our own bytes
        assert type(same) is cls
        assert str(same) == "rank 3 said no"
        assert (same.ranks, same.call, same.step, same.round) == ((3, 5), 7, 2.5, 9)


def test_fields_that_are_not_known_are_empty() -> None:
    error = LogsyncError("no")

    assert (error.ranks, error.call, error.step, error.round) == ((), None, None, None)


@pytest.mark.parametrize("cls", AGREED, ids=lambda c: c.__name__)
def test_every_agreed_error_has_a_word_on_the_wire_and_arrives_with_its_fields(cls: type[AgreedError]) -> None:
    assert agreed_error(kind_of(cls("no"))) is cls

    arrived = error_of(failure_of(cls("rank 3: no", ranks=(3,), call=7, step=2)), 9)
    assert type(arrived) is cls
    assert str(arrived) == "rank 3: no"
    assert (arrived.ranks, arrived.call, arrived.step, arrived.round) == ((3,), 7, 2, 9)


def test_a_mismatch_of_settings_travels_too() -> None:
    assert agreed_error(kind_of(errors.ConfigMismatch("no"))) is errors.ConfigMismatch


def test_an_unknown_word_is_still_an_agreed_error() -> None:
    assert agreed_error("from the future") is AgreedError
    assert agreed_error(kind_of(PeerLost("no"))) is AgreedError


@pytest.mark.parametrize(
    ("text", "limit", "shown"),
    [
        ("plain é 日本 😀", 500, "plain é 日本 😀"),
        ("a\nb\r\t\x00\x1b[2J", 500, r"a\nb\r\t\x00\x1b[2J"),
        ("\u2028\u202e\ud800", 500, r"\u2028\u202e\ud800"),
        ("x" * 10, 10, "x" * 10),
        ("x" * 11, 10, "x" * 10 + "... (11 characters)"),
        ("", 10, ""),
    ],
)
def test_text_of_others_is_escaped_and_cut(text: str, limit: int, shown: str) -> None:
    assert printable(text, limit) == shown
    assert printable(text, limit).isprintable()


def test_a_long_text_full_of_control_characters_travels_within_its_bound() -> None:
    error = failure_of(BadValue("\x00" * 10**6, ranks=tuple(range(1000))))

    assert len(error.text) <= 4096
    assert len(error.ranks) == 64
    assert str(error_of(error, 1)).isprintable()
