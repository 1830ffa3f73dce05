"""Reports are as wide everywhere, and doctests find the class that they belong to."""

import doctest
import inspect
import os

from disparse_plugin._support.public_path import home

_from_module = doctest.DocTestFinder._from_module

os.environ["COLUMNS"] = "120"  # reports are as wide as the terminal


def _is_defined_in(finder, module, thing):
    """Tell so of a class by the file that defines it, although its ``__module__`` names the public room."""
    if module is not None and inspect.isclass(thing):
        return home(thing) == module.__name__
    return _from_module(finder, module, thing)


doctest.DocTestFinder._from_module = _is_defined_in
