"""The times that follow some times, where those have a rhythm."""

import numpy as np

_OFTEN = 0.9  # the share of distances that must be the usual one: others are rows that lack, or days without a market


def times_after(times: np.ndarray, num_steps: int) -> np.ndarray | None:
    """Returns the times that follow: by months, by weekdays, or by the usual distance; None where none is usual.

    Numbers are followed by others if all distances are alike.

    Args:
        times: numbers, or dates and times as ``datetime64``, rising.
        num_steps: how many times follow.

    >>> times_after(np.array(["2024-01-31", "2024-02-29", "2024-03-31"], "datetime64[D]"), 2)
    array(['2024-04-30', '2024-05-31'], dtype='datetime64[D]')
    >>> times_after(np.array([0.0, 0.5, 1.0]), 2)
    array([1.5, 2. ])
    """
    if len(times) < 3:
        return None
    ahead = np.arange(1, num_steps + 1)
    if np.issubdtype(times.dtype, np.datetime64):
        for rhythm in (_months_after, _weekdays_after):
            found = rhythm(times, ahead)
            if found is not None:
                return found
        gaps = np.diff(times)
        usual = np.sort(gaps)[len(gaps) // 2]
        return times[-1] + ahead * usual if np.mean(gaps == usual) >= _OFTEN else None
    usual = np.diff(times).mean()
    # All of them: numbers such as 202412 for December are not followed by 202413.
    is_regular = np.allclose(np.diff(times), usual, rtol=1e-6, atol=0)
    return times[-1] + ahead * usual if is_regular else None


def _months_after(times: np.ndarray, ahead: np.ndarray) -> np.ndarray | None:
    """Returns what follows times at the same place of each month, or each quarter or year, or at its end."""
    months = times.astype("datetime64[M]")
    gaps = np.diff(months).astype(int)
    usual = np.sort(gaps)[len(gaps) // 2]
    if usual < 1 or np.mean(gaps == usual) < _OFTEN:
        return None
    coming = months[-1] + ahead * usual
    since, until = times - months, (months + 1).astype(times.dtype) - times
    if (since == since[0]).all() and since[0] < np.timedelta64(28, "D"):
        return coming.astype(times.dtype) + since[0]
    return (coming + 1).astype(times.dtype) - until[0] if (until == until[0]).all() else None


def _weekdays_after(times: np.ndarray, ahead: np.ndarray) -> np.ndarray | None:
    """Returns what follows dates that leave out weekends."""
    days = times.astype("datetime64[D]")
    gaps = np.diff(days).astype(int)
    if (times != days).any() or not np.is_busday(days).all() or gaps.max() == 1:
        return None
    is_next = np.busday_count(days[:-1], days[1:]) == 1
    return np.busday_offset(days[-1], ahead).astype(times.dtype) if is_next.mean() >= _OFTEN else None
