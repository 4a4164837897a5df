"""Ratings: files of users, items and ratings as sparse matrices, and users held out to test recommendations."""

import csv
import math
import re
from array import array
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pyrovae.inference.messages import is_integer

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_SEPARATORS = ("::", "\t", "|", ";", ",", " ")
_Names = tuple[list[str], array]


class Ratings(NamedTuple):
    """Ratings as a sparse matrix, with the names of its rows and columns, from :func:`load_ratings`.

    Args:
        x: the ratings, ``(users, items)``, float32, a ``scipy.sparse.csr_array``; what is not stored was not rated.
        users: the users' identifiers in the file, by row: integers if all of them are, else strings, rising.
        items: the items' identifiers, by column.
    """

    x: "csr_array"
    users: np.ndarray
    items: np.ndarray


class HeldOutUsers(NamedTuple):
    """Users that are not in the training data, with some items of each held out.

    Args:
        seen: the items that a recommender is given, ``(users, items)``, sparse.
        held_out: the items that it should find, of the same shape.
        users: the users' identifiers, by row.
    """

    seen: "csr_array"
    held_out: "csr_array"
    users: np.ndarray


class RatingSplits(NamedTuple):
    """Ratings of users to train on, and of other users for validation and test, from :func:`hold_out_users`.

    Args:
        train: all ratings of the training users, ``(users, items)``, sparse.
        validation: users to choose models by.
        test: users to test the chosen model on.
        users: the training users' identifiers, by row of `train`.
        items: the items' identifiers, by column of all matrices.
    """

    train: "csr_array"
    validation: HeldOutUsers
    test: HeldOutUsers
    users: np.ndarray
    items: np.ndarray


def load_ratings(
    path: str | Path,
    *,
    user: int | str = 0,
    item: int | str = 1,
    rating: int | str | None = 2,
    timestamp: int | str | None = None,
    separator: str | None = None,
    threshold: float | None = None,
    min_ratings: int = 1,
) -> Ratings:
    """Loads a text file with a user, an item and a rating in each line, such as those of MovieLens.

    A first line whose rating is not a number holds the names of the columns.

    Args:
        path: the file, in UTF-8.
        user: the column of the user, its number from 0 or its name in the first line.
        item: the column of the item.
        rating: the column of the rating; None if each line is a purchase, a click or the like, which counts as 1.
        timestamp: the column of the time, a number, or None. With it, the last of several ratings of one item by one
            user is taken, in the order of the file at equal times; without it, several are an error, except where all
            count as 1.
        separator: what stands between columns; None to take the first of ``::``, tabulator, ``|``, ``;``, comma and
            space that is in the first line.
        threshold: ratings below it are left out, all others become 1; None to keep the ratings.
        min_ratings: users with fewer ratings than this, after the threshold, are left out.

    Returns:
        The :class:`Ratings`. Items that nobody rated, after that, have no column.

    Raises:
        ValueError: when the first line names another column as the user, the item, the rating or the timestamp than a
            number says; when a line lacks a column, or its rating or timestamp is not a finite number; when a user
            rates an item twice and there is no timestamp; when a rating to keep is 0, which no sparse matrix tells from
            none; when nothing is left.
        FileNotFoundError: when there is no such file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "ratings.csv")
    ...     _ = path.write_text("user,film,stars\\n7,Alien,5\\n7,Brazil,2\\n9,Brazil,4\\n")
    ...     ratings = load_ratings(path, threshold=4)
    >>> ratings.x.toarray(), ratings.users, ratings.items
    (array([[1., 0.],
           [0., 1.]], dtype=float32), array([7, 9]), array(['Alien', 'Brazil'], dtype='<U6'))
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    if not is_integer(min_ratings) or min_ratings < 1:
        raise ValueError(f"min_ratings must be an integer of at least 1, got {min_ratings!r}.")
    if threshold is not None and rating is None:
        raise ValueError("threshold compares ratings, but rating=None says that there are none. Leave one of them out.")
    columns = {"user": user, "item": item, "rating": rating, "timestamp": timestamp}
    read = _read(path, {name: c for name, c in columns.items() if c is not None}, separator)
    (user_ids, user_places), (item_ids, item_places) = (_in_order(names) for names, _ in read[:2])
    row, column = user_places[np.asarray(read[0][1])], item_places[np.asarray(read[1][1])]
    values, times = np.asarray(read[2]), np.asarray(read[3])
    if timestamp is not None:
        order = np.argsort(times, kind="stable")
        row, column, values = row[order], column[order], values[order]

    _, first, pair, count = np.unique(
        row * len(item_ids) + column, return_index=True, return_inverse=True, return_counts=True
    )
    if rating is not None and timestamp is None and len(first) < len(row):
        i = int(np.flatnonzero(count[pair] > 1)[0])
        raise ValueError(
            f"{path}: user {user_ids[row[i]]} rates item {item_ids[column[i]]} {count[pair[i]]} times. Name the column "
            "of the timestamp, to take the last rating; or keep one line of them."
        )
    last = np.empty(len(first), np.intp)
    last[pair] = np.arange(len(pair))  # of several, the last is written last
    row, column, values = row[last], column[last], values[last]

    if threshold is None:
        zero = np.flatnonzero(values.astype(np.float32) == 0)
        if len(zero):
            i = int(zero[0])
            raise ValueError(
                f"{path}: user {user_ids[row[i]]} rates item {item_ids[column[i]]} 0, which no sparse matrix tells "
                "from no rating. Write other numbers, or give a threshold."
            )
    else:
        kept = values >= threshold
        row, column, values = row[kept], column[kept], np.ones(int(kept.sum()))
    kept = np.bincount(row, minlength=len(user_ids))[row] >= min_ratings
    if not kept.any():
        raise ValueError(
            f"{path}: nothing is left of {len(first):,} ratings by threshold={threshold} and "
            f"min_ratings={min_ratings}. Lower them."
        )
    x = _sparse(values[kept], row[kept], column[kept], (len(user_ids), len(item_ids)))
    with_user, with_item = np.diff(x.indptr) > 0, np.bincount(x.indices, minlength=x.shape[1]) > 0
    return Ratings(x[with_user][:, with_item], user_ids[with_user], item_ids[with_item])


def hold_out_users(ratings: Ratings, *, validation: int, test: int, share: float = 0.2, seed: int = 0) -> RatingSplits:
    """Splits ratings by user, and holds out some items of each validation and test user: strong generalisation.

    A recommender learns from the training users, is given what a test user has seen, and should find the items held
    out. Items that no training user has rated have no column. What is drawn depends on the seed alone, not on the
    random state.

    Args:
        ratings: the ratings.
        validation: number of validation users.
        test: number of test users.
        share: share of the items of each of them that is held out, rounded down, but at least one.
        seed: seed of the draw of users and of items.

    Returns:
        The :class:`RatingSplits`.

    Raises:
        ValueError: when a number is negative, `share` is not between 0 and 1, or no user is left to train on; when a
            user to hold out has rated fewer than two of the items that have a column.

    References:
        Variational Autoencoders for Collaborative Filtering, D. Liang, R. G. Krishnan, M. D. Hoffman and T. Jebara,
        2018, https://arxiv.org/abs/1802.05814 (section 4.1); Collaborative Filtering: A Machine Learning Perspective,
        B. Marlin, 2004, https://hdl.handle.net/1807/119369 (weak and strong generalisation).

    >>> from scipy.sparse import csr_array
    >>> x = csr_array(np.ones((10, 5), np.float32))
    >>> splits = hold_out_users(Ratings(x, np.arange(10), np.arange(5)), validation=2, test=3, share=0.4)
    >>> splits.train.shape, splits.test.seen.sum(1), splits.test.held_out.sum(1)
    ((5, 5), array([3., 3., 3.], dtype=float32), array([2., 2., 2.], dtype=float32))
    """
    for name, size in (("validation", validation), ("test", test)):
        if not is_integer(size) or size < 0:
            raise ValueError(f"{name} must be a number of users, an integer of at least 0, got {size!r}.")
    if not 0 < share < 1:
        raise ValueError(f"share must be above 0 and below 1, got {share}.")
    x = ratings.x.tocsr(copy=True)
    x.sum_duplicates()  # which sorts too: what is drawn must not depend on how the matrix is stored
    x.eliminate_zeros()
    num_train = x.shape[0] - validation - test
    if num_train < 1:
        raise ValueError(
            f"there are {x.shape[0]} users: {validation} for validation and {test} to test on leave none to train on."
        )
    rng = np.random.RandomState(seed)  # NumPy guarantees that what it draws never changes
    parts = np.split(rng.permutation(x.shape[0]), [num_train, num_train + validation])
    train = x[parts[0]]
    rated = np.bincount(train.indices, minlength=x.shape[1]) > 0
    first, second = (_hold_out_items(x[rows][:, rated], ratings.users[rows], share, rng) for rows in parts[1:])
    return RatingSplits(train[:, rated], first, second, ratings.users[parts[0]], ratings.items[rated])


def _hold_out_items(x: "csr_array", users: np.ndarray, share: float, rng: np.random.RandomState) -> HeldOutUsers:
    is_held_out = np.zeros(x.nnz, bool)
    for row, (start, end) in enumerate(zip(x.indptr[:-1], x.indptr[1:], strict=True)):
        size = int(end - start)
        if size < 2:
            raise ValueError(
                f"user {users[row]} has rated {size} of the items that training users have rated, too few to hold "
                "one out and to see another. Load the ratings with a larger min_ratings."
            )
        # A share such as 0.29 of 100 may be 28.999999999999996.
        num_held_out = min(max(1, math.floor(share * size + 1e-9)), size - 1)
        is_held_out[start + rng.permutation(size)[:num_held_out]] = True
    seen, held_out = x.copy(), x.copy()
    seen.data[is_held_out] = 0
    held_out.data[~is_held_out] = 0
    for part in (seen, held_out):
        part.eliminate_zeros()
    return HeldOutUsers(seen, held_out, users)


def _sparse(values: np.ndarray, row: np.ndarray, column: np.ndarray, shape: tuple[int, int]) -> "csr_array":
    from scipy.sparse import csr_array  # slow to import

    return csr_array((values.astype(np.float32), (row, column)), shape)


def _in_order(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns different names, rising, as integers if all of them are; and the place of each name given."""
    ids = np.array(names)
    if all(re.fullmatch(r"0|-?[1-9][0-9]{0,17}", name) for name in names):  # 007 and 7 are two names
        ids = ids.astype(np.int64)
    order = np.argsort(ids)
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return ids[order], places


def _lines(path: Path, separator: str | None) -> Iterator[tuple[int, list[str]]]:
    """Yields the cells of each line that is not empty, with its number from 1."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            if separator is None:
                first = next((line for line in file if line.strip()), "")
                separator = next((s for s in _SEPARATORS if s in first.strip()), ",")
                file.seek(0)
            # The module csv knows quotes, but separators of one character alone.
            rows = csv.reader(file, delimiter=separator) if len(separator) == 1 else (x.split(separator) for x in file)
            for number, row in enumerate(rows, start=1):
                cells = [cell.strip() for cell in row]
                if any("\n" in cell for cell in cells):
                    raise ValueError(
                        f"{path}, line {number}: a cell goes on in the next line, as after a quote that is not closed. "
                        "Close the quote, or leave that column out of the file."
                    )
                if any(cells):
                    yield number, cells
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged, or no text in UTF-8 ({error}). Convert it to UTF-8.") from error


def _read(path: Path, columns: dict[str, int | str], separator: str | None) -> tuple[_Names, _Names, array, array]:
    """Returns users and items, each as the names and the number of the name in each line; ratings; timestamps."""
    names: dict[str, dict[str, int]] = {"user": {}, "item": {}}
    codes = {"user": array("q"), "item": array("q")}
    numbers = {"rating": array("d"), "timestamp": array("d")}
    lines = _lines(path, separator)
    first = next(lines, None)
    if first is None:
        raise ValueError(f"{path} holds no lines.")
    places = _places(path, first[1], columns)
    is_header = any(isinstance(column, str) for column in columns.values()) or (
        "rating" in places and places["rating"] < len(first[1]) and not _is_number(first[1][places["rating"]])
    )
    if is_header:
        _check_names(path, first[1], columns)
    for line, cells in lines if is_header else chain([first], lines):
        try:
            values = {name: cells[place] for name, place in places.items()}
        except IndexError:
            raise ValueError(
                f"{path}, line {line}: there are {len(cells)} columns, too few for {_listed(places)} (from 0). Name "
                "the columns and the separator of the file; of a file without ratings say rating=None."
            ) from None
        for name, code in codes.items():
            if not values[name]:
                raise ValueError(f"{path}, line {line}: the {name} is empty.")
            code.append(names[name].setdefault(values[name], len(names[name])))
        for name, number in numbers.items():
            text = values.get(name, "1")
            if not _is_number(text):
                raise ValueError(f"{path}, line {line}: the {name} must be a finite number, got {text!r}.")
            number.append(float(text))
    if not codes["user"]:
        raise ValueError(f"{path} holds a line of names alone.")
    if "rating" not in places and not is_header:  # nothing shows whether the first line holds names of columns
        for name in ("user", "item"):
            known = list(names[name])
            if not known[0].isdecimal() and len(known) > 1 and all(map(str.isdecimal, known[1:])):
                raise ValueError(
                    f"{path}: the {name} of the first line, {known[0]!r}, is not a number, but all others are. If it "
                    f"is the name of the column, say {name}={known[0]!r}; else remove the line."
                )
    users, items = ((list(names[name]), codes[name]) for name in ("user", "item"))
    return users, items, numbers["rating"], numbers["timestamp"]


def _places(path: Path, header: list[str], columns: dict[str, int | str]) -> dict[str, int]:
    """Returns the number of each column, from the names in the first line where it is given by name."""
    places = {}
    for name, column in columns.items():
        if isinstance(column, str):
            if header.count(column) != 1:
                raise ValueError(f"{path}: {name}={column!r} must be one of the columns, {', '.join(header)}.")
            places[name] = header.index(column)
        elif is_integer(column) and column >= 0:
            places[name] = column
        else:
            raise ValueError(f"{name} must be the number of a column, from 0, or its name, got {column!r}.")
    if len(set(places.values())) < len(places):
        raise ValueError(f"each of {_listed(places)} must be a column of its own.")
    return places


def _check_names(path: Path, header: list[str], columns: dict[str, int | str]) -> None:
    """Raises a ValueError if a column is given by its number, and the first line names another one as such."""
    plain = [re.sub(r"[\W_]*(ids?)?$", "", name.strip().lower()) for name in header]
    for name, column in columns.items():
        if isinstance(column, int) and column < len(plain) and name in plain and plain[column] != name:
            named = header[plain.index(name)]
            raise ValueError(
                f"{path}: the {name} would be column {column}, {header[column]!r}, but there is {named!r}. Give the "
                f"columns by name, {name}={named!r} or {name}={header[column]!r}."
            )


def _listed(places: dict[str, int]) -> str:
    return ", ".join(f"{name}={place}" for name, place in places.items())


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
