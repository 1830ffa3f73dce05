"""The whole run is shared among processes, reports are as wide everywhere, and doctests find what they belong to."""

import doctest
import inspect
import os

import pytest

from disparse_plugin._support.public_path import home

_from_module = doctest.DocTestFinder._from_module

os.environ["COLUMNS"] = "120"  # reports are as wide as the terminal


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Use up to four processes where all tests are asked for, and none are said; a file or two begin at once in one."""
    option = config.option
    whole = config.args_source == config.ArgsSource.TESTPATHS and not option.usepdb
    if whole and getattr(option, "numprocesses", 0) is None:  # pytest-xdist is there
        option.numprocesses, option.dist = min(4, os.cpu_count() or 1), "loadfile"


def _is_defined_in(finder, module, thing):
    """Tell so of a class by the file that defines it, although its ``__module__`` names the public room."""
    if module is not None and inspect.isclass(thing):
        return home(thing) == module.__name__
    return _from_module(finder, module, thing)


doctest.DocTestFinder._from_module = _is_defined_in
