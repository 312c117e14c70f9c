"""What describes the project beside its pages: version, citation, and the workflow on GitHub."""

import re
import shlex

import pytest
import yaml
from conftest import ROOT
from pages import text_of

import train_llava

WORKFLOW = yaml.safe_load(text_of(".github/workflows/tests.yml"))
JOBS = WORKFLOW["jobs"]


def test_one_version():
    assert yaml.safe_load(text_of("CITATION.cff"))["version"] == train_llava.__version__
    assert re.search(r"^## ([\d.]+)", text_of("docs/changelog.md"), re.M)[1] == train_llava.__version__


def test_the_suite_runs_on_every_python_with_both_ends_of_the_requirements():
    matrix = JOBS["suite"]["strategy"]["matrix"]
    lowest = re.search(r'requires-python = ">=(.*)"', text_of("pyproject.toml"))[1]
    assert matrix["python"][0] == lowest and all(isinstance(each, str) for each in matrix["python"])  # 3.10 is no 3.1
    assert matrix["versions"] == ["oldest", "newest"]
    assert all(f"--{each}" in text_of("run_tests.sh") for each in matrix["versions"])


@pytest.mark.parametrize("job", JOBS)
def test_a_job_runs_what_there_is(job):
    lines = [step["run"] for step in JOBS[job]["steps"] if "run" in step]
    scripts = [words[i + 1] for words in map(shlex.split, lines) for i, word in enumerate(words) if word == "bash"]
    assert lines and all((ROOT / script).is_file() for script in scripts)
    assert scripts or job == "style"


def test_the_slow_tests_run_at_night_alone():
    assert JOBS["slow"]["if"].startswith("github.event_name == 'schedule'")
    assert any(each.get("cron") for each in WORKFLOW[True]["schedule"])  # YAML reads `on` as true
