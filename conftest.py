"""Doctests find a class in the file that defines it, although its ``__module__`` names the public room."""

import doctest
import inspect

from disparse_plugin._support.public_path import home

_from_module = doctest.DocTestFinder._from_module


def _is_defined_in(finder, module, thing):
    if module is not None and inspect.isclass(thing):
        return home(thing) == module.__name__
    return _from_module(finder, module, thing)


doctest.DocTestFinder._from_module = _is_defined_in
