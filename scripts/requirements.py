"""What an environment lacks of some requirement files, one requirement a line; exit code 1 if it lacks anything.

    python scripts/requirements.py FILE ...            looks versions up, so it takes no time
    python scripts/requirements.py --torch FILE ...    of torch alone, which is imported, too

It runs before anything is installed: with any Python 3, and without any package but pip.
"""

import sys

try:
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement
    from packaging.version import Version
except ImportError:
    try:
        from pip._vendor.packaging.requirements import Requirement
        from pip._vendor.packaging.version import Version
    except ImportError:
        sys.exit("everything")


def requirements(files):
    for file in files:
        with open(file) as lines:
            for line in lines:
                text = line.split("#")[0].strip()
                need = Requirement(text) if text else None
                if need and (need.marker is None or need.marker.evaluate()):
                    yield need


def problem(need):
    """None, or what is wrong with the package that is there."""
    try:
        found = version(need.name)
    except PackageNotFoundError:
        return "is not there"
    # a container's own build of a release is named as one before it: 2.11.0a0+5228986.nv26.01
    if not need.specifier.contains(Version(found).base_version):
        return f"{found} is there"
    return None


def torch_problem(need):
    wrong = problem(need)
    if wrong is None:
        try:
            import torch

            torch.ones(1).sum()
        except Exception as error:  # a library that is missing, a build for another processor
            return "cannot be used (" + str(error).strip().splitlines()[-1] + ")"
    return wrong


def main():
    files = [argument for argument in sys.argv[1:] if argument != "--torch"]
    only_torch = "--torch" in sys.argv
    lacking = 0
    for need in requirements(files):
        if only_torch and need.name != "torch":
            continue
        wrong = torch_problem(need) if only_torch else problem(need)
        if wrong:
            lacking += 1
            print(f"{need} ({wrong})")
    if only_torch and not lacking:
        print(version("torch"))
    sys.exit(lacking > 0)


main()
