"""Times, sizes and counts as a reader wants them: two or three digits, since an estimate has no more."""

SECONDS_OF_A_YEAR = 365 * 86_400.0
_TIMES = (
    (SECONDS_OF_A_YEAR, "years"),
    (2 * 86_400.0, "days"),
    (2 * 3600.0, "h"),
    (120.0, "min"),
    (0.0, "s"),
)
_UNITS = {"years": SECONDS_OF_A_YEAR, "days": 86_400.0, "h": 3600.0, "min": 60.0, "s": 1.0}
_SIZES = ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB"), (1.0, "B"))
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def duration(seconds: float) -> str:
    """A time: `12 s`, `3.4 h`, `21 days`."""
    unit = next(name for least, name in _TIMES if seconds >= least)
    return f"{_two_digits(seconds / _UNITS[unit])} {unit}"


def size(num_bytes: float) -> str:
    """Bytes: `1.4 GB`."""
    least, unit = next((one for one in _SIZES if num_bytes >= one[0]), _SIZES[-1])
    return f"{_two_digits(num_bytes / least)} {unit}"


def count(number: float) -> str:
    """A large number: `2.6 M`, `1 T`."""
    least, unit = next((one for one in _COUNTS if number >= one[0]), _COUNTS[-1])
    return f"{number / least:.3g} {unit}".rstrip()


def _two_digits(value: float) -> str:
    return (
        f"{value:.1f}"
        if value < 10
        else f"{float(f'{value:.2g}'):,.0f}"
        if value >= 1000
        else f"{value:.0f}"
    )
