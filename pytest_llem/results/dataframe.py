"""A StudyResult as a data frame of pandas."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_llem.results.models import StudyResult
from pytest_llem.results.tabular import Per, table

if TYPE_CHECKING:
    import pandas


def dataframe(result: StudyResult, per: Per) -> pandas.DataFrame:
    """Return the rows of *result* as a data frame, with the columns' units in ``attrs``.

    Raises:
        ImportError: pandas is not installed.
        ValueError: *per* is neither.
    """
    rows = table(result, per)
    try:
        import pandas
    except ImportError as error:
        reason = "a data frame takes pandas, which is not installed: pip install 'pytest-llem[dataframe]'"
        raise ImportError(reason, name="pandas") from error
    frame = pandas.DataFrame(list(rows.rows), columns=list(rows.columns))
    # A metric that nobody has is a column of numbers all the same.
    frame = frame.astype(dict.fromkeys(rows.units, "float64"))
    frame.attrs["units"] = dict(rows.units)
    return frame
