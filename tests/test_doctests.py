"""Every public function shows in a doctest what it is for, and the examples are true."""

import doctest
import importlib
import inspect

import pytest
import torch

ROOMS = ("batch", "groups", "linear", "measures", "metrics", "removal", "report", "sites", "tracing")


def _public():
    for room in ROOMS:
        module = importlib.import_module(f"demem.{room}")
        own = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        for name in getattr(module, "__all__", [n for n in own if not n.startswith("_")]):
            value = getattr(module, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                yield pytest.param(value, id=f"{room}.{name}")


@pytest.mark.parametrize("value", list(_public()))
def test_examples(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write files
    torch.manual_seed(0)
    names = vars(inspect.getmodule(value))
    found = doctest.DocTestFinder(exclude_empty=True).find(value, value.__name__, globs=dict(names, torch=torch))
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for example in found:
        runner.run(example)
    assert runner.failures == 0
    assert runner.tries or not inspect.isfunction(value), f"{value.__name__} has no doctest"
