"""Logs as killed and resumed runs leave them behind."""

import json

import pytest

from nats_zoo import NatsError
from nats_zoo.base.run_log import has_key, latest, read_log, series


def write(path, *records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_null_is_absent_and_the_rest_as_it_was_written(tmp_path):
    record = {"step": 1, "epoch": 0.5, "loss": None, "alpha": {"conv": [[0.0, 1.5]]}, "accepted": False, "note": "x"}
    found = read_log(write(tmp_path / "log", record))
    assert found == [{key: value for key, value in record.items() if key != "loss"}]
    assert not has_key(found, "loss")
    assert has_key(found, "alpha")


@pytest.mark.parametrize(
    "tail",
    ["", "\n", '{"step": 2, "epo', '{"step": 2, "epoch": 1, "loss": 1.', "\0\0\0", "{" * 99_999],
    ids=["none", "blank", "key", "number", "zeros", "deep"],
)
def test_a_torn_last_line_is_left_out(tail, tmp_path):
    path = write(tmp_path / "log", {"step": 1, "epoch": 1, "loss": 2}, tail=tail)
    assert read_log(path) == [{"step": 1, "epoch": 1, "loss": 2}]


def test_a_line_cut_within_a_letter_is_torn_and_a_whole_one_without_a_line_break_counts(tmp_path):
    path = tmp_path / "log"
    path.write_bytes('{"step": 1, "epoch": 1}\n{"step": 2, "epoch": 1, "note": "ü'.encode()[:-1])
    assert len(read_log(path)) == 1
    assert len(read_log(write(path, {"step": 1, "epoch": 1}, tail='{"step": 2, "epoch": 2}'))) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 1, "ep', "line 2: not JSON"),
        ("[1]", "line 2: expected an object"),
        ('{"step": 1}', "line 2: expected an object with the keys 'step' and 'epoch'"),
        ('{"step": null, "epoch": 1}', "line 2: step: expected a number, found None"),
        ('{"step": 1, "epoch": NaN}', "line 2: step, epoch: expected finite numbers"),
        ('{"step": 1, "epoch": 1, "predicted": "low"}', "line 2: predicted: expected a number, found 'low'"),
        ('{"step": 1, "epoch": 1, "loss": true}', "line 2: loss: expected a number, found True"),
        ('{"step": 1, "epoch": 1, "loss": 1' + "0" * 400 + "}", "line 2: loss: expected a number, found 1"),
    ],
)
def test_a_line_in_the_middle_that_is_no_record_is_named(line, message, tmp_path):
    path = write(tmp_path / "log.jsonl", {"step": 1, "epoch": 1}, tail=f"{line}\n" + '{"step": 3, "epoch": 1}\n')
    with pytest.raises(NatsError, match=rf"log\.jsonl: {message}") as caught:
        read_log(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "."])
def test_a_log_that_can_not_be_read_is_named(name, tmp_path):
    with pytest.raises(NatsError, match="can not be read as a log"):
        read_log(tmp_path / name)


def test_what_a_resumed_run_logs_again_counts(tmp_path):
    first = [{"step": s, "epoch": s / 10, "loss": 9.0} for s in (10, 20, 30)]
    again = [{"step": s, "epoch": s / 10, "loss": float(s)} for s in (20, 30, 40)]
    other = [{"step": 20, "epoch": 2.0, "alpha": {}}]
    records = read_log(write(tmp_path / "log", *first, *again, *other))
    assert series(records, "loss") == ([1.0, 2.0, 3.0, 4.0], [9.0, 20.0, 30.0, 40.0])
    assert latest(records, "alpha") == other


def test_records_of_one_step_may_differ_in_a_further_key():
    records = [{"step": 1, "epoch": 1, "trial": n, "loss": loss} for n, loss in ((2, 0), (1, 5), (2, 7))]
    assert [record["loss"] for record in latest(records, "trial", "trial")] == [5, 7]
    assert [record["loss"] for record in latest(records, "trial")] == [7]
