"""What several test files share is in a helper; a test file imports no other."""

import ast

import pytest
from conftest import ROOT

FILES = sorted((ROOT / "tests").glob("test_*.py"))
FOR_NOW = {("test_original", "test_app")}  # to be removed with the import


def imported(file):
    """The names of all modules that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (each.name for each in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_test_file_imports_another(file):
    tests = {(file.stem, module) for module in imported(file) if module in {other.stem for other in FILES}}
    assert tests <= FOR_NOW
