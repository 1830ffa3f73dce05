"""Warnings that a block must give, among others that it may give."""

import contextlib
import re
import warnings


@contextlib.contextmanager
def warned(kind, match):
    """As ``pytest.warns``, which would raise the other warnings of the block again: a trainer has some of its own."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    texts = [str(warning.message) for warning in seen if issubclass(warning.category, kind)]
    assert any(re.search(match, text) for text in texts), texts
