"""Import every module of the installed wheel: a sub-package that was not shipped shows here, not at a user's."""

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path

import disparse_plugin

NEEDS = {"disparse_plugin.hf_trainer": "transformers"}  # what the tests' extra leaves out

where = Path(disparse_plugin.__file__)
assert where.is_relative_to(sys.argv[1]), f"imported {where}, not the wheel"
assert where.with_name("py.typed").is_file(), "py.typed is missing"
names = [module.name for module in pkgutil.walk_packages(disparse_plugin.__path__, "disparse_plugin.")]
for name in names:
    if name not in NEEDS or importlib.util.find_spec(NEEDS[name]):
        importlib.import_module(name)
print(f"{len(names)} modules of the wheel imported")
