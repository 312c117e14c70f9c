"""Refuses unknown flags of a training in a tenth of a second, before torch is imported and ranks are started.

    python scripts/check_flags.py --learning_rat 1e-4

An import of transformers' flags takes seconds, so their names are read out of its source, and ours out of
train_llava/planning/arguments.py and train_llava/training/renamed.py. Values are left to the training's own parser.
"""

import ast
import difflib
import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "train_llava"
ARGUMENTS, OLD_FLAGS = PACKAGE / "planning" / "arguments.py", PACKAGE / "training" / "renamed.py"


def fields(file: Path) -> dict[str, list[str]]:
    """The annotated fields of each class in a source file."""
    classes = (node for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.ClassDef))
    return {
        each.name: [field.target.id for field in each.body if isinstance(field, ast.AnnAssign)]  # type: ignore
        for each in classes
    }


def known_flags() -> set[str]:
    """Names of all flags. Of a flag that is true if not given, argparse makes another one, `no_...`."""
    ours = fields(ARGUMENTS)
    theirs = fields(Path(find_spec("transformers").origin).with_name("training_args.py"))  # type: ignore
    names = {name for part in ("ModelArguments", "DataArguments", "LlavaTrainingArguments") for name in ours[part]}
    names |= {*theirs["TrainingArguments"]}
    return names | {f"no_{name}" for name in names} | {"help"}


def renamed_flags() -> dict[str, str]:
    """What became of flags of other scripts."""
    for node in ast.parse(OLD_FLAGS.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "RENAMED":
            return ast.literal_eval(node.value)
    raise LookupError("RENAMED")


def describe(name: str, known: set[str]) -> str:
    """What to say of an unknown flag."""
    renamed = renamed_flags()
    if name in renamed:
        return f"--{name} {renamed[name]}"
    close = difflib.get_close_matches(name, known, 1)
    return f"not known: --{name} ({f'do you mean --{close[0]}?' if close else '--help lists all flags'})"


def main() -> None:
    known = known_flags()
    for word in sys.argv[1:]:
        name = word[2:].partition("=")[0].replace("-", "_")
        if not word.startswith("--") or not name or name in known:
            continue
        print(f"error: {describe(name, known)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
