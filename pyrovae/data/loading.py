"""Loading data sets by name: a registry of functions, each of which returns the fixed splits of one data set."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyrovae.data.arrays import ARRAYS, load_arrays
from pyrovae.data.kinds import Override
from pyrovae.data.music import is_music, load_music
from pyrovae.data.pictures import load_pictures
from pyrovae.data.schema import Schema, quoted
from pyrovae.data.sounds import is_sounds, load_sounds
from pyrovae.data.splits import Splits
from pyrovae.data.tables import load_numbers, load_table
from pyrovae.data.text import is_text_file, load_text
from pyrovae.inference.messages import warn

Loader = Callable[[Path], Splits]

DATA_SETS: dict[str, Loader] = {}


def register(name: str) -> Callable[[Loader], Loader]:
    """Registers a function as a data set, which :func:`load` then finds by its name.

    Decorate a function that takes the folder of data sets, a ``pathlib.Path``, and returns :class:`Splits`. The first
    line of its docstring is the description of the data set: what the data are, their shape, and the sizes of the
    parts. The command line lists it with the others; to use a data set of your own there, register it in a script that
    calls ``pyrovae.cli.main()``.

    Args:
        name: the name, which must be new.

    Raises:
        ValueError: when the name is taken, or the function has no docstring.

    >>> import torch
    >>> from pyrovae.data import random_splits
    >>> @register("noise")
    ... def noise(root):
    ...     '''Normal noise, shape (2,); 80 / 10 / 10.'''
    ...     return random_splits(torch.randn(100, 2), validation=10, test=10)
    >>> load("noise").test.x.shape
    torch.Size([10, 2])
    >>> DATA_SETS.pop("noise")(None).train.x.shape  # removed again, because this is only an example
    torch.Size([80, 2])
    """

    def add(loader: Loader) -> Loader:
        if name in DATA_SETS:
            raise ValueError(f"name must be new, but there is a data set {name!r} already. Choose another name.")
        if not inspect.getdoc(loader):
            raise ValueError(
                f"the function of the data set {name!r} must have a docstring that describes it. Write what the data "
                "are, their shape and the sizes of the parts in its first line."
            )
        DATA_SETS[name] = loader
        return loader

    return add


def descriptions() -> dict[str, str]:
    """Returns the names of all registered data sets, each with its description.

    >>> descriptions()["digits"]
    'Digits of scikit-learn, shape (1, 8, 8); 1,197 / 300 / 300 in a fixed random order.'
    """
    return {name: (inspect.getdoc(loader) or "").partition("\n")[0] for name, loader in DATA_SETS.items()}


def load(
    name: str,
    root: str | Path = "data",
    *,
    schema: Schema | None = None,
    overrides: Mapping[str, Override] | None = None,
    context: Sequence[str] = (),
    numbers: bool = False,
    **options: Any,
) -> Splits:
    """Loads a data set with its fixed splits, each with `x` and `labels` (None for data without labels).

    ``digits``, ``mnist``, ``fashion-mnist``, ``kmnist``, ``omniglot`` and ``cifar10`` are registered, with images
    scaled to [0, 1]; :func:`descriptions` lists all data sets with their shapes and the sizes of their parts. Add your
    own with :func:`register`.

    The path of a file loads its rows, 8/10, 1/10 and 1/10 of them in a fixed random order.

    A table (CSV, TSV, Parquet, Excel, or any other text file) is encoded by its schema, see :class:`Table`:
    ``splits.schema`` describes the columns of x, in own units, with NaN for missing cells, and ``split.rows`` are the
    numbers of the rows in the file.

    A ``.txt`` file (gzipped or not) that is no table holds text, a datum a line: ``splits.vocabulary`` has the words of
    the training part; :func:`load_text` has options.

    A ``.npy`` or ``.npz`` file holds numbers, which are not scaled, with NaN where an element is missing; an ``.npz``
    file one array, with or without labels ``y``, or arrays ``train``, ``validation`` and ``test``, which are then the
    splits. Bytes of shape ``(N, height, width)``, or with three or four channels, first or last, are images: they
    become numbers from 0 to 1, with the channels first. A ``.npy`` file of more than 64 MB stays on the disk.

    A sparse matrix stays sparse: that of an ``.npz`` file of ``scipy.sparse.save_npz``, or X of AnnData's ``.h5ad``.
    An ``.h5`` or ``.hdf5`` file is read into memory, as an ``.npz`` file with the same names of arrays. Both need
    ``pip install 'pyrovae[hdf5]'``.

    The path of a folder loads its pictures as numbers from 0 to 1, with the channels first. Subfolders are classes,
    numbered in the order of their names; or ``train``, ``test`` and ``validation``, with or without such subfolders.
    Pictures of other sizes are scaled to the size that most have. All become grey or coloured, with eight bits and
    without transparency, and a warning says how many were changed.

    The path of a folder, or a ``.zip`` archive, with more sounds (WAV, FLAC, OGG, MP3 or AIFF) than pictures loads the
    levels of their frequencies over time, with ``splits.spectrogram``: see :func:`load_sounds`. Of MIDI files, or from
    a ``.json`` file of songs, it loads the keys that sound, with ``splits.piano_roll``: see :func:`load_music`.

    Args:
        name: the name of a data set, or the path of a file or a folder.
        root: the folder of the data sets. Those of torchvision are downloaded to it. IDX files may also be there (or in
            ``raw``, or in ``<name>/raw``), gzipped or not.
        schema: the schema of a table, such as that of the training data; found out if None.
        overrides: kinds of columns of a table, as for :meth:`Schema.infer`.
        context: names of columns of a table that a model is to condition on, as for :class:`Table`.
        numbers: refuse tables, except for a ``.csv`` file of numbers alone, which is read without a schema: all columns
            as they are, and no missing cells.
        **options: fields of the :class:`Dialect` of a table.

    Raises:
        ValueError: when there is no such data set; when a file holds no data, infinity, cells that cannot be read
            without a guess or do not fit the schema, or, as numbers alone, words or NaN; when there is a schema, and
            the data are no table; when a folder has no picture or one that cannot be read.
        FileNotFoundError: when there is no such file.

    >>> splits = load("digits")
    >>> splits.train.x.shape, splits.validation.x.shape, splits.test.x.shape
    (torch.Size([1197, 1, 8, 8]), torch.Size([300, 1, 8, 8]), torch.Size([300, 1, 8, 8]))
    """
    path = Path(name)
    of_table = {"schema": schema, "overrides": overrides, "context": context, **options}
    given = next((argument for argument, value in of_table.items() if value), None)
    if given and (name in DATA_SETS or path.is_dir() or path.suffix in ARRAYS or is_sounds(path) or is_music(path)):
        columns = "" if schema is None else f" with the columns {quoted(schema.names)}"
        raise ValueError(
            f"{name} holds arrays, pictures, sounds or music, and {given} is for a table: give a file such as .csv, "
            f".tsv or .parquet{columns}."
        )
    if name in DATA_SETS:
        if path.exists():
            warn(f"{name} is the data set of this name. There is a file or a folder, too: for that, name it ./{name}.")
        return DATA_SETS[name](Path(root))
    if is_music(path):
        return load_music(path)
    if is_sounds(path):
        return load_sounds(path)
    if path.is_dir():
        return load_pictures(path)
    if path.suffix in ARRAYS:
        return load_arrays(path)
    if numbers and path.suffix == ".csv":
        return load_numbers(path)
    if numbers and path.is_file() and not is_text_file(path):
        raise ValueError(f"{path} must be a .npy, .npz, .h5, .h5ad or .csv file of numbers.")
    if schema is None and not overrides and not options and is_text_file(path):
        return load_text(path)
    if not numbers and (path.suffix or path.is_file()):
        return load_table(path, schema, overrides, context, **options)
    raise ValueError(
        f"there is no data set {name!r}. Name one of {', '.join(DATA_SETS)}; a file: a table (.csv, .tsv, .parquet, "
        ".xlsx, ...), arrays (.npy, .npz, .h5, .h5ad) or songs (.json); a folder of pictures, sounds or MIDI files; or "
        "add it with pyrovae.data.register."
    )
