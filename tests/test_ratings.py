"""Files of ratings are read as they stand, or refused with the line; users are held out, and nothing is lost."""

import re

import numpy as np
import pytest
from scipy.sparse import coo_array, csr_array

from pyrovae.data import HeldOutUsers, Ratings, hold_out_users, load_ratings


def write(folder, text, name="ratings.txt"):
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def as_dict(ratings: Ratings) -> dict:
    """Returns the ratings by user and item."""
    x = ratings.x.tocoo()
    return {(ratings.users[i], ratings.items[j]): value for i, j, value in zip(*x.coords, x.data, strict=True)}


EXPECTED = {(2, 30): 5.0, (2, 4): 3.0, (11, 4): 1.5, (11, 30): 4.0}


@pytest.mark.parametrize("separator", ["::", "\t", "|", ";", ",", " "])
@pytest.mark.parametrize("header", [None, ("user", "item", "rating", "timestamp")])
def test_every_usual_form_is_read(separator, header, tmp_path):
    lines = [header, (11, 4, "1.5", 700), (2, 30, 5, 900), (2, 4, "3", 800), (11, 30, "4.0", 100)]
    text = "\n".join(separator.join(map(str, line)) for line in lines if line)
    for end in ("", "\n", "\n\n"):
        ratings = load_ratings(write(tmp_path, text + end))
        assert as_dict(ratings) == EXPECTED
        assert (ratings.users.tolist(), ratings.items.tolist()) == ([2, 11], [4, 30]), "in the order of numbers"
        assert (ratings.x.dtype, ratings.x.format) == (np.float32, "csr")
    for text_again in (text.replace("\n", "\r\n"), b"\xef\xbb\xbf" + text.encode()):
        assert as_dict(load_ratings(write(tmp_path, text_again))) == EXPECTED


def test_columns_are_found_by_number_and_by_name(tmp_path):
    path = write(tmp_path, 'stars,"who, exactly",when,film\n5,ann,9,"Dune, 1984"\n2,ben,8,Alien\n')
    expected = {("ann", "Dune, 1984"): 5.0, ("ben", "Alien"): 2.0}
    assert as_dict(load_ratings(path, user=1, item=3, rating=0)) == expected
    assert as_dict(load_ratings(path, user="who, exactly", item="film", rating="stars")) == expected
    assert as_dict(load_ratings(path, user=1, item="film", rating=None)) == dict.fromkeys(expected, 1.0)


@pytest.mark.parametrize("names", [["07", "7"], ["7", "x"], ["1.0", "1"], ["9" * 30, "1"]])
def test_names_that_are_not_all_integers_stay_strings(names, tmp_path):
    ratings = load_ratings(write(tmp_path, "".join(f"{name},1,2\n" for name in names)))
    assert ratings.users.tolist() == sorted(names)


def test_threshold_and_least_number_of_ratings(tmp_path):
    path = write(tmp_path, "1,1,5\n1,2,4\n1,3,3.5\n2,1,4\n2,4,1\n3,3,1\n3,5,5\n3,1,4\n")
    liked = load_ratings(path, threshold=4)
    assert as_dict(liked) == dict.fromkeys([(1, 1), (1, 2), (2, 1), (3, 5), (3, 1)], 1.0)
    assert liked.items.tolist() == [1, 2, 5], "items 3 and 4 have no column"
    assert as_dict(load_ratings(path, threshold=4, min_ratings=2)) == dict.fromkeys(
        [(1, 1), (1, 2), (3, 5), (3, 1)], 1.0
    )
    assert load_ratings(path, min_ratings=3).users.tolist() == [1, 3]


def test_of_several_ratings_the_last_is_taken(tmp_path):
    path = write(tmp_path, "1,1,5,30\n1,1,2,90\n1,2,3,5\n1,1,4,60\n2,1,1,7\n2,1,3,7\n")
    assert as_dict(load_ratings(path, timestamp=3)) == {(1, 1): 2.0, (1, 2): 3.0, (2, 1): 3.0}
    assert as_dict(load_ratings(path, timestamp=3, threshold=3)) == {(1, 2): 1.0, (2, 1): 1.0}, "not the 5 of before"
    with pytest.raises(ValueError, match="user 1 rates item 1 3 times. Name the column of the timestamp"):
        load_ratings(path)
    assert as_dict(load_ratings(path, rating=None)) == dict.fromkeys([(1, 1), (1, 2), (2, 1)], 1.0)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", {}, "ratings.txt holds no lines"),
        ("user,item,rating\n", {}, "holds a line of names alone"),
        ("1,2,3\n1,3\n", {}, "line 2: there are 2 columns, too few for user=0, item=1, rating=2"),
        ("1;2;3\n", {"separator": ","}, "line 1: there are 1 columns"),
        ("1,2,3\n1,3,good\n", {}, "line 2: the rating must be a finite number, got 'good'"),
        ("1,2,3\n1,3,nan\n", {}, "line 2: the rating must be a finite number, got 'nan'"),
        ("1,2,3\n1,3,\n", {}, "line 2: the rating must be a finite number, got ''"),
        ("1,2,3,4\n1,3,4,inf\n", {"timestamp": 3}, "line 2: the timestamp must be a finite number"),
        ("1,2,3\n,3,3\n", {}, "line 2: the user is empty"),
        ("1,2,3\n1,3,0\n", {}, "user 1 rates item 3 0, which no sparse matrix tells from no rating"),
        ("1,2,3\n1,3,1e-60\n", {}, "user 1 rates item 3 0, which no sparse matrix tells from no rating"),
        ('1,"Alien,3\n1,Brazil,4\n2,"Dune",3\n', {}, "line 1: a cell goes on in the next line"),
        (b"1,\xff,3\n", {}, "is damaged, or no text in UTF-8"),
        ("1,2,3\n", {"threshold": 4}, "nothing is left of 1 ratings by threshold=4 and min_ratings=1"),
        ("1,2,3\n", {"min_ratings": 0}, "min_ratings must be an integer of at least 1, got 0"),
        ("1,2,3\n", {"rating": None, "threshold": 4}, "threshold compares ratings, but rating=None"),
        ("a,b,c\n1,2,3\n", {"user": "x"}, "user='x' must be one of the columns, a, b, c"),
        ("a,a,c\n1,2,3\n", {"user": "a"}, "user='a' must be one of the columns"),
        ("1,2,3\n", {"item": 0}, "each of user=0, item=0, rating=2 must be a column of its own"),
        ("1,2,3\n", {"item": -1}, "item must be the number of a column, from 0, or its name, got -1"),
        ("user,item\n1,2\n1,3\n", {"rating": None}, "the user of the first line, 'user', is not a number"),
        ("item,user,stars\n1,2,3\n", {}, "user would be column 0, 'item', but there is 'user'"),
        (",User ID,item,rating\n0,1,2,3\n", {"rating": 3}, "user would be column 0, '', but there is 'User ID'"),
        ("a,film\na,2\nb,3\n", {"rating": None}, "the item of the first line, 'film', is not a number"),
    ],
)
def test_what_cannot_be_read_is_refused(text, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_ratings(write(tmp_path, text), **arguments)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_ratings(tmp_path / "none.csv")


# Users held out.


def random_ratings(num_users: int = 60, num_items: int = 40) -> Ratings:
    rng = np.random.default_rng(0)
    x = np.where(rng.random((num_users, num_items)) < 0.3, rng.integers(1, 6, (num_users, num_items)), 0)
    x[:, :3] = 1  # so that every user has rated something
    return Ratings(csr_array(x.astype(np.float32)), 100 + np.arange(num_users), 1000 + np.arange(num_items))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.01, 0.99])
def test_no_rating_is_lost_and_none_is_both_seen_and_held_out(share):
    ratings = random_ratings()
    splits = hold_out_users(ratings, validation=10, test=15, share=share)
    assert [splits.train.shape[0], len(splits.validation.users), len(splits.test.users)] == [35, 10, 15]
    users = [splits.users, splits.validation.users, splits.test.users]
    assert sorted(np.concatenate(users)) == ratings.users.tolist()
    everything = as_dict(ratings)
    for rows, ids in ((splits.train, splits.users), *((p.seen + p.held_out, p.users) for p in splits[1:3])):
        part = as_dict(Ratings(rows, ids, splits.items))
        items = set(splits.items)
        assert part == {(u, i): x for (u, i), x in everything.items() if u in set(ids) and i in items}
    for part in splits[1:3]:
        assert isinstance(part, HeldOutUsers)
        seen, held_out = (np.diff(x.indptr) for x in (part.seen, part.held_out))
        total = seen + held_out
        assert (part.seen.multiply(part.held_out)).nnz == 0
        assert held_out.tolist() == [min(max(1, int(share * n + 1e-9)), n - 1) for n in total.tolist()]


def test_items_without_a_training_user_have_no_column():
    x = np.ones((20, 6), np.float32)
    x[:, 5] = (
        np.arange(20)
        == hold_out_users(
            Ratings(csr_array(np.ones((20, 6), np.float32)), np.arange(20), np.arange(6)), validation=0, test=5
        ).test.users[0]
    )
    splits = hold_out_users(Ratings(csr_array(x), np.arange(20), np.arange(6)), validation=0, test=5)
    assert splits.items.tolist() == [0, 1, 2, 3, 4] and splits.test.seen.shape == (5, 5)


def test_the_split_depends_on_the_seed_alone():
    ratings = random_ratings()
    first = hold_out_users(ratings, validation=10, test=15, seed=3)
    np.random.seed(5)
    again = hold_out_users(ratings, validation=10, test=15, seed=3)
    other = hold_out_users(ratings, validation=10, test=15, seed=4)
    assert (first.test.held_out != again.test.held_out).nnz == 0 and first.users.tolist() == again.users.tolist()
    assert first.users.tolist() != other.users.tolist()
    coo = ratings.x.tocoo()
    order = np.random.permutation(coo.nnz)
    entries = coo.data[order], (coo.coords[0][order], coo.coords[1][order])
    stored_otherwise = ratings._replace(x=coo_array(entries, coo.shape))
    moved = hold_out_users(stored_otherwise, validation=10, test=15, seed=3)
    assert (first.test.held_out != moved.test.held_out).nnz == 0
    halves = ratings._replace(x=coo_array((np.tile(coo.data / 2, 2), np.tile(coo.coords, 2)), coo.shape))
    moved = hold_out_users(halves, validation=10, test=15, seed=3)
    assert (first.test.held_out != moved.test.held_out).nnz == 0
    # Published numbers depend on the split: it must never change.
    assert first.test.users.tolist()[:5] == SPLIT["users"]
    assert first.test.held_out[[0]].indices.tolist() == SPLIT["items"]


SPLIT = {"users": [132, 138, 153, 151, 141], "items": [2, 12]}


def test_each_item_of_a_user_is_held_out_equally_often():
    # Of 4 items one is held out: over 400 users, each item 100 times, with a standard error of sqrt(400 / 4 * 3 / 4).
    x = csr_array(np.ones((401, 4), np.float32))
    splits = hold_out_users(Ratings(x, np.arange(401), np.arange(4)), validation=0, test=400, share=0.25)
    counts = splits.test.held_out.sum(0)
    assert (abs(counts - 100) < 5 * np.sqrt(75)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test": -1}, "test must be a number of users, an integer of at least 0, got -1"),
        ({"validation": 0.1}, "validation must be a number of users, an integer of at least 0, got 0.1"),
        ({"share": 1.0}, "share must be above 0 and below 1, got 1.0"),
        ({"validation": 50}, "there are 60 users: 50 for validation and 10 to test on leave none to train on"),
    ],
)
def test_splits_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        hold_out_users(random_ratings(), **{"validation": 10, "test": 10} | arguments)


def test_users_with_one_item_cannot_be_held_out():
    x = csr_array(np.eye(6, 3, dtype=np.float32) + np.array([1, 0, 0], np.float32))
    with pytest.raises(ValueError, match=r"user \d has rated 1 of the items that training users have rated"):
        hold_out_users(Ratings(x, np.arange(6), np.arange(3)), validation=0, test=5)
