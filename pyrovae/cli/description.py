"""``pyrovae describe``."""

import textwrap
from typing import Any

from pyrovae import storage
from pyrovae.cli.common import as_options, new_file
from pyrovae.data import Schema
from pyrovae.data.reading import open_source


def describe(
    file: str,
    output: str | None = None,
    kinds: dict[str, Any] | None = None,
    delimiter: str | None = None,
    decimal: str | None = None,
    thousands: str | None = None,
    encoding: str | None = None,
    header: bool | None = None,
    missing: list[str] | str | None = None,
) -> None:
    """Describes the columns of a table: kinds, missing cells and likelihoods; writes a schema to edit.

    Args:
        file: a text file (.csv, .tsv, ...), a Parquet or an Excel file.
        output: a .yaml file for the schema, which can be edited and given to the other commands with --schema.
        kinds: kinds of columns that are not to be found out; as '{"zip": "Category"}', or with fields, as '{"date":
            {"kind": "Time", "format": "%d/%m/%Y"}}'.
        delimiter: what separates cells; found out by default.
        decimal: the decimal sign, '.' or ','.
        thousands: what separates thousands.
        encoding: the encoding of the file, utf-8 by default.
        header: whether the first line holds names; found out by default.
        missing: the text that means a missing cell, or a list, as '["-", "unknown"]'; by default '', ?, NA, N/A, NaN,
            nan, null and NULL.
    """
    out = None if output is None else new_file(output, (".yaml", ".yml"))
    given = {
        "delimiter": delimiter,
        "decimal": decimal,
        "thousands": thousands,
        "encoding": encoding,
        "header": header,
        "missing": missing if isinstance(missing, str | None) else tuple(missing),
    }
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        source = open_source(file, **options)
        schema = Schema.infer(source, kinds, **options)
    except ValueError as error:
        raise ValueError(as_options(str(error))) from None
    if out is not None:  # first, because what reads the lines, such as head, may end before the last
        storage.write_atomically(out, schema.to_yaml().encode())
    print(f"{file}: {source.num_rows:,} rows, {len(schema.columns)} columns\n\n{schema.describe()}\n")
    for kind in dict.fromkeys(type(column) for column in schema.columns):
        _print_wrapped(f"{kind.__name__}: {kind.likelihood}")
    for note in schema.notes:
        _print_wrapped(f"note: {as_options(note)}")
    if out is not None:
        print(f"schema: {out}")


def _print_wrapped(text: str) -> None:
    print(textwrap.fill(text, 80, subsequent_indent="    ", break_on_hyphens=False))  # -999 is one word
