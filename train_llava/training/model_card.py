"""The model card of a built model, a run or a merged model: `README.md`, as the hub shows it."""

import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load, try_to_load_from_cache
from peft import PeftModel
from torch import nn
from transformers import TrainerState
from yaml import YAMLError

from train_llava.cli import write_whole
from train_llava.ingest.bad_images import BadImages
from train_llava.ingest.data_files import parse_data_path, paths_of
from train_llava.model.folder import CARD, is_foreign_card
from train_llava.model.image_use import verdict
from train_llava.model.structure import components_table
from train_llava.pages.charts import chart
from train_llava.planning.arguments import DataArguments, LlavaTrainingArguments, ModelArguments

HOW_TO_USE = """```python
from transformers import pipeline

describe = pipeline("image-text-to-text", model="{model}")
content = [{{"type": "image", "path": "image.jpg"}}, {{"type": "text", "text": "What is this?"}}]
print(describe(text=[{{"role": "user", "content": content}}], return_full_text=False)[0]["generated_text"])
```"""


BUILT = """{header}

# {name}

A LLaVA, built by train_llava and not trained: its projector is new, so it does not know yet what it sees.

| part | from | its license |
|---|---|---|
| vision tower | `{vision}` | {vision_license} |
| language model | `{language}` | {language_license} |
"""

LICENSE = ("license", "license_name", "license_link")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TIMES = ("_runtime", "_per_second", "_time", "_delta")  # how names end that Trainer adds to an evaluation


MERGED = """{header}

# {name}

A LLaVA: `{base}` with the adapter `{adapter}` merged into it by train_llava.

```text
{components}
```

## Use

{use}
"""


def card_header(bases: Sequence[str], adapter: bool = False, data: Iterable[str] = ()) -> str:
    """The YAML at the top of a card, which the hub reads. It knows its own names alone, of models and of datasets: what
    lies on this machine is left out; in place of a base that does, there are those that it has of train_llava itself.
    The license is that of the last base."""
    known = [base if not Path(base).exists() else handed_on(base) for base in bases]
    names = [name for each in known for name in ([each] if isinstance(each, str) else each)]
    datasets = [name for name in dict.fromkeys(paths_of(data)) if HUB_ID.fullmatch(name) and not Path(name).exists()]
    data = ModelCardData(
        base_model=(names[0] if len(names) == 1 else names) or None,
        datasets=datasets or None,
        **license_of(bases[-1]),
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["llava", "lora"] if adapter else ["llava"],
    )
    return f"---\n{data.to_yaml()}\n---"


def known_of(base: str) -> dict[str, Any]:
    """The YAML of a base's card, of a folder or of what was fetched of a hub id; nothing where there is none."""
    try:
        path = Path(base) / CARD if Path(base).exists() else try_to_load_from_cache(base, CARD)
        return (isinstance(path, str | Path) and metadata_load(path)) or {}
    except (OSError, ValueError, YAMLError):  # somebody else has written it
        return {}


def handed_on(base: str) -> str | list[str]:
    """The bases that the card in a folder names, if train_llava has written it; another's names what its own model was
    made of."""
    return [] if is_foreign_card(Path(base) / CARD) else known_of(base).get("base_model") or []


def license_of(base: str) -> dict[str, str]:
    """What a base's card says of its license; without a link to a file of its own, which is not here."""
    said = {name: value for name, value in known_of(base).items() if name in LICENSE}
    if not str(said.get("license_link", "")).startswith("https://"):
        said.pop("license_link", None)
    return said


def built_card(name: str, vision: str, language: str) -> str:
    """The card of a model that was built of two. `vision` and `language` are folders or hub ids."""
    fields = {"header": card_header([vision, language]), "name": name}
    for part, source in (("vision", vision), ("language", language)):
        known = known_of(source)
        license = known.get("license_name") or known.get("license") or "its card names none"
        fields |= {part: name_of(source), f"{part}_license": license}
    return BUILT.format(**fields)


def merged_card(components: str, name: str, adapter: str, base: str) -> str:
    """The card of a model that an adapter was merged into. `name` is its id on the hub, or that of its folder."""
    fields = {"header": card_header([base]), "base": name_of(base), "adapter": name_of(adapter)}
    return MERGED.format(**fields, name=name, components=components, use=HOW_TO_USE.format(model=name))


def write_card(
    model: nn.Module,
    state: TrainerState,
    args: LlavaTrainingArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    hub_id: str | None,
) -> None:
    """Writes README.md and curves.png into the output folder, from what the run logged. `hub_id`: its name there."""
    folder, history = Path(args.output_dir), state.log_history
    name = hub_id or folder.resolve().name
    draw_curves(history, folder / "curves.png")
    adapter, base = isinstance(model, PeftModel), model_args.model_name_or_path
    step, scores = held_out(state, args)
    looks = verdict(scores) if "image_records" in scores else ""
    facts = {
        "trained from": f"`{name_of(base)}`",
        "strategy": f"`--train_type {model_args.train_type}`",
        "data": ", ".join(map(data_name, data_args.data_path)),
        "held-out data": ", ".join(map(data_name, data_args.eval_data_path or [])),
        **{f"held-out {name}, at step {step:,}": f"{value:.4f}" for name, value in scores.items()},
        "does it look at the image?": looks,
        "images": BadImages(folder / "bad_images.jsonl", 0).summary().replace(f"{folder}/", ""),
        "steps": f"{state.global_step:,} of {args.step_size} {args.step_unit} each on {args.world_size} ranks",
        "epochs": f"{state.epoch or 0:.3g}",
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
        "loss, at the end": last(history, "loss", ".4f"),
        "samples per second": last(history, "samples_per_second", ".1f"),
        "tokens per second": last(history, "tokens_per_second", ",.0f"),
        "most memory of a rank, GB": last(history, "memory_gb", ".1f"),
        "seconds": last(history, "train_runtime", ",.0f"),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "deepspeed")),
    }
    samples = [f"![the last sample captions](samples/{path.name})" for path in sorted(folder.glob("samples/*.png"))]
    sections = [
        card_header([base], adapter, data_args.data_path),
        f"# {name}",
        f"A LLaVA{' adapter' * adapter}, trained with train_llava.",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items() if value)]),
        f"```text\n{components_table(model)}\n```",
        "![loss over steps](curves.png)",
        *samples[-1:],
        "## Use",
        HOW_TO_USE.format(model=name),
    ]
    if is_foreign_card(folder / CARD):
        return
    write_whole(folder / CARD, "\n\n".join(sections) + "\n")


def held_out(state: TrainerState, args: LlavaTrainingArguments) -> tuple[int, dict[str, float]]:
    """The step at which the weights that are saved were last evaluated, and what was measured: the loss, with
    --eval_generate the score, and whatever else the log has of it."""
    logs = [log for log in state.log_history if "eval_loss" in log]
    if args.load_best_model_at_end:
        logs = [log for log in logs if log["step"] == state.best_global_step]
    log = logs[-1] if logs else {"step": 0}
    names = [name for name in log if name.startswith("eval_") and not name.endswith(TIMES)]
    return log["step"], {name.removeprefix("eval_"): log[name] for name in names}


def name_of(path: str | Path) -> str:
    """The name of a folder or file of this machine in a card, without its path; an id of the hub stays as it is."""
    return Path(path).resolve().name if Path(path).exists() else str(path)


def data_name(text: str) -> str:
    """`[format=]path[:weight]` as a card shows it."""
    format, path, weight = parse_data_path(text)
    return f"`{name_of(path)}`{f' as {format}' * bool(format)}{f' x {weight:g}' * (weight != 1)}"


def last(history: list[dict[str, Any]], name: str, form: str) -> str:
    """The last logged value of a name, as text; empty where there is none."""
    return next((f"{log[name]:{form}}" for log in reversed(history) if name in log), "")


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Draws the loss, and the held-out loss where there is one, over steps."""
    with chart(path) as axes:
        for name, label, style in (("loss", "training", "-"), ("eval_loss", "held-out", "o--")):
            points = [(log["step"], log[name]) for log in history if name in log]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        axes.set(xlabel="step", ylabel="loss")
