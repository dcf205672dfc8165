import pytest

from flows.numbers import counted, duration, interval, number, share


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(24_310), "24,310"),
        (number(0.44661), "0.4466"),
        (number(-0.0215, 3, signed=True), "−0.0215"),
        (number(0.121, 3, signed=True), "+0.121"),
        (number(0.0, signed=True), "0"),
        (number(0.00001234, 2), "1.2e−05"),
        (number(float("nan")), "nan"),
        (interval(None, 1.0), "none claimed"),
        (interval(0.5, 1.25), "0.5000 to 1.250"),
        (share(0.0004), "< 0.1 %"),
        (share(0.0397, signed=True), "+4.0 %"),
        (share(-0.0188, signed=True), "−1.9 %"),
        (share(1.0), "100 %"),
        (counted(4, 5, 0.2836, 0.9949), "4 of 5 (28.4 % to 99.5 %)"),
        (duration(0.42), "0.4 s"),
        (duration(92), "1 min 32 s"),
        (duration(3_840), "1 h 04 min"),
    ],
)
def test_numbers_read_as_people_write_them(text: str, expected: str) -> None:
    assert text.replace("\N{NO-BREAK SPACE}", " ") == expected
