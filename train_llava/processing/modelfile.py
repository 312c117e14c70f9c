"""A chat template -> Ollama's Modelfile, whose template is one of Go (text/template)."""

import json

from train_llava.cli import InputError
from train_llava.processing.chat_template import ROUNDS, ChatTemplate


def modelfile(template: ChatTemplate, files: list[str], ends: list[str]) -> str:
    """A Modelfile.

    Args:
        template: proven.
        files: of the model, beside the Modelfile.
        ends: the tokens that end an answer.

    Raises:
        InputError: see `openings`.
    """
    places, asked = openings(template)
    cases = "".join(
        f'{{{{- {"else " * (i > 0)}if eq $place "{place}" }}}}{{{{ {quoted(text)} }}}}\n'
        for i, (place, text) in enumerate(places.items())
    )
    lines = [
        *(f"FROM ./{file}" for file in files),
        *(f"PARAMETER stop {quoted(end)}" for end in ends),
        "PARAMETER temperature 0",  # the likeliest word, as `infer` does
        'TEMPLATE """{{- $before := "first" }}',
        "{{- range .Messages }}",
        '{{- $place := printf "%s %s" $before .Role }}',
        f"{cases}{{{{- end }}}}",
        "{{- .Content }}",
        "{{- $before = .Role }}",
        "{{- end }}",
        f'{{{{- {quoted(asked)} }}}}"""',
    ]
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """A text as a literal of Go; JSON's escapes are Go's, too."""
    return json.dumps(text, ensure_ascii=False)


def openings(template: ChatTemplate) -> tuple[dict[str, str], str]:
    """The text before a message by the roles of the message before it and its own, as in "user assistant"; and the text
    behind the last question.

    Raises:
        InputError: the text depends on more than these roles, which the Modelfile's template could not know.
    """
    first, answer, again, asked = template.outline(["user", "assistant", "user"], True)
    places = {"first user": first, "user assistant": answer, "assistant user": again}
    if template.takes_system():
        places["first system"], places["system user"], _ = template.outline(["system", "user"], True)
    for start in ([], ["system"]) if template.takes_system() else ([],):
        for rounds in range(1, ROUNDS + 1):
            roles = [*start, *["user", "assistant"] * (rounds - 1), "user"]
            written = [places[f"{before} {role}"] for before, role in zip(["first", *roles], roles, strict=False)]
            if [*written, asked] != template.outline(roles, True):
                hint = "The files that --format gguf writes hold it as it is"
                raise InputError(f"this chat template cannot be written as Ollama's. {hint}.")
    return places, asked
