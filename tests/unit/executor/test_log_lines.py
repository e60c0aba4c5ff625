from __future__ import annotations

from nos_backend.executor.log_lines import LogLines


def test_lines_come_whole_however_they_arrive() -> None:
    log = LogLines()
    assert log.feed(b"one\ntw", 0) == ["one"]
    assert log.feed(b"o\n", 0) == ["two"]
    assert log.feed(b"the end", 0) == []
    assert log.feed(b"", 0) == ["the end"]


def test_a_long_line_is_cut_at_4_kib() -> None:
    log = LogLines()
    lines = log.feed(b"x" * 5000, 0) + log.feed(b"x" * 5000, 0) + log.feed(b"x\nnext\n", 0)
    assert lines == ["x" * 4096 + " [cut]", "next"]


def test_more_than_100_lines_a_second_are_dropped_and_counted() -> None:
    log = LogLines()
    assert len(log.feed(b"line\n" * 150, 0)) == 100
    assert log.feed(b"later\n", 1) == ["[50 lines dropped: over 100 a second]", "later"]


def test_the_tail_keeps_200_lines() -> None:
    log = LogLines()
    for second in range(5):
        log.feed(b"".join(b"%d\n" % number for number in range(90)), second)
    assert len(log.tail) == 200
    assert log.tail[-1] == "89"


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert LogLines().feed(b"a\xffb\r\n", 0) == ["a�b"]
