"""The strict reader: each kind of value, and errors that name source, key, what was expected and found."""

import math

import pytest

from nats_zoo import NatsError
from nats_zoo.base.reading import MAX_KEY, Reader
from nats_zoo.genotype.genotype import GenotypeError

READ = Reader("file.json")


def test_what_is_expected_is_returned():
    assert READ.object({"a": 1}, "key") == {"a": 1}
    assert READ.keys({"b": 2, "a": 1}, "key", ("a",), ("b", "c")) == {"b": 2, "a": 1}
    assert READ.sequence([1, 2], "key", "two numbers", 2) == [1, 2]
    assert READ.sequence((1,), "key", "numbers") == (1,)
    assert READ.number(-0.5, "key", "a number") == -0.5
    assert READ.text("ü", "key") == "ü"
    assert READ.one_of("b", "key", ("a", "b")) == "b"


REFUSED = {
    "no object": (lambda: READ.object([], "key"), "key: expected an object with string keys, found list"),
    "a key that is no string": (lambda: READ.object({1: 2}, "key"), "an object with string keys, found dict"),
    "a line break in a key": (lambda: READ.object({"a\nb": 2}, "key"), r"printable characters, found 'a\nb'"),
    "a long key": (lambda: READ.object({"a" * (MAX_KEY + 1): 2}, "key"), "keys of at most 256 printable characters"),
    "an unknown key": (lambda: READ.keys({"a": 1, "x": 1}, "", ("a",)), "file.json: unknown key 'x', expected only a"),
    "a missing key": (lambda: READ.keys({}, "key", ("a",), ("b",)), "file.json: key: key 'a' is missing"),
    "text as a list": (lambda: READ.sequence("12", "key", "numbers"), "key: expected numbers, found '12'"),
    "an empty list": (lambda: READ.sequence([], "key", "numbers"), "key: expected numbers, found []"),
    "another length": (lambda: READ.sequence([1], "key", "two numbers", 2), "key: expected two numbers, found [1]"),
    "true as a number": (lambda: READ.number(True, "key", "a number"), "key: expected a number, found True"),
    "not a number": (lambda: READ.number(math.nan, "key", "a number"), "found nan"),
    "infinity": (lambda: READ.number(math.inf, "key", "a number"), "found inf"),
    "beyond float": (lambda: READ.number(10**400, "key", "a number"), "key: expected a number, found 1000"),
    "below": (lambda: READ.number(0, "key", "a positive number", least=1), "found 0"),
    "above": (lambda: READ.number(3, "key", "up to 2", most=2), "found 3"),
    "a float as an integer": (lambda: READ.number(1.0, "key", "an integer", kinds=(int,)), "found 1.0"),
    "empty text": (lambda: READ.text("", "key"), "key: expected a line of text, found ''"),
    "two lines": (lambda: READ.text("a\nb", "key"), r"key: expected a line of text, found 'a\nb'"),
    "another word": (lambda: READ.one_of("c", "key", ("a", "b")), "key: expected one of a, b, found 'c'"),
    "no word": (lambda: READ.one_of([], "key", ("a", "b")), "key: expected one of a, b, found []"),
}


@pytest.mark.parametrize(("read", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_expected_is_refused_in_one_line(read, words):
    with pytest.raises(NatsError) as error:
        read()
    message = str(error.value)
    assert message.startswith("file.json: ")
    assert words in message
    assert len(message.splitlines()) == 1
    assert len(message) < 200


def test_errors_are_of_the_class_that_is_asked_for():
    with pytest.raises(GenotypeError):
        Reader("file.json", GenotypeError).text(5, "key")
