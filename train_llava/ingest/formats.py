"""Records as they are published -> messages and images.

One function per format; FORMATS names each with the field by which its records are recognised. To add one, write a
function that takes a record (and the caption fields, which others ignore) and returns messages and images, and add
its line to FORMATS; docs/data.md has an example.
"""

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import unquote_to_bytes

from train_llava.cli import InputError
from train_llava.ingest.benchmarks import BENCHMARKS, from_benchmark
from train_llava.ingest.conversation import IMAGE_TOKEN, Message, check_conversation_size, is_answer
from train_llava.ingest.limits import MOST_IMAGE_BYTES

Record = dict[str, Any]
Fields = dict[str, str]  # which fields of a caption record hold what, see CAPTION_FIELDS
Parsed = tuple[list[Message], list[Any]]  # an image is a name, or {"bytes", "path"}

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
ROLES |= {role: role for role in ("system", "user", "assistant")}
# fields that change what a record means, in ways that a LLaVA cannot follow
UNKNOWN = {"video", "videos", "audio", "audios", "tools", "functions"}
WEIGHTS = {"loss", "weight", "train"}  # of a turn, in the formats of other trainers: false, 0 or a share
# how the bytes of JPEG, PNG, WEBP, GIF, BMP and TIFF begin in base64
IMAGE_IN_BASE64 = re.compile(r"(/9j/|iVBORw0KGgo|UklGR|R0lGOD|Qk[0-3]|SUkq|TU0A)[A-Za-z0-9+/\s]{40,}={0,2}\s*")
# for caption records: the field of the answer, the field of the image, and the field or the words of the instruction
CAPTION_FIELDS = {"answer": "caption", "image": "image", "instruction": "Describe this image in detail."}


def from_sharegpt_or_openai(record: Record, fields: Fields) -> Parsed:
    """LLaVA's `conversations` ({"from", "value"}) and the `messages` of TRL and others ({"role", "content"})."""
    messages, images, inside = [], as_list(record.get("images") or record.get("image") or None), []
    for turn in as_list(from_json(record.get("conversations") or record.get("messages"))):
        turn = turn if isinstance(turn, dict) else {}
        if any(turn[name] not in (None, 1) for name in turn.keys() & WEIGHTS):
            raise InputError("a turn with a weight of its own; here all answers count alike. Leave the field out")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(content, list):
            content = text_of_parts(content, inside)
        known = ROLES.get(role) or (ROLES.get(role.strip().lower()) if isinstance(role, str) else None)
        if known is None or not isinstance(content, str):
            raise InputError(
                f"a turn from {role!r} with {type(content).__name__} as text; known are {', '.join(ROLES)}"
            )
        messages.append({"role": known, "content": content})
    if inside and images and inside != images:
        raise InputError('images both inside the messages and in "images". Leave one of them out')
    images = images or inside
    if "messages" in record and not any(IMAGE_TOKEN in message["content"] for message in messages):
        put_images_first(messages, len(images))  # as TRL does; LLaVA's records always say where
    return with_system(messages, record.get("system") or record.get("system_prompt")), images


def with_system(messages: list[Message], system: Any) -> list[Message]:
    """Puts the system prompt of a record, which stands beside its turns, in front of them.

    Raises:
        InputError: it is no text, or the turns begin with another one.
    """
    if system is None or (isinstance(system, str) and not system.strip()):
        return messages
    first = {"role": "system", "content": system}
    if messages[:1] == [first]:
        return messages
    if not isinstance(system, str) or (messages and messages[0]["role"] == "system"):
        raise InputError('the field "system" is no text, or not the system prompt that the turns begin with')
    return [first, *messages]


def from_cauldron(record: Record, fields: Fields) -> Parsed:
    """the_cauldron and FineVision: images, then `texts` of {"user", "assistant"}, without placeholders."""
    messages, images = [], as_list(record.get("images"))
    for turn in as_list(record["texts"]):
        for role in ("user", "assistant"):
            if not isinstance(turn, dict) or not isinstance(turn.get(role), str):
                raise InputError(f'an entry of "texts" has no text as {role!r}')
            messages.append({"role": role, "content": turn[role]})
    put_images_first(messages, len(images))
    return messages, images


def from_caption(record: Record, fields: Fields) -> Parsed:
    """An image and a text about it, as TextOCR-GPT4o and image-caption sets have."""
    answer, images = record.get(fields["answer"]), as_list(record.get(fields["image"]))
    if not isinstance(answer, str) or not images:
        raise InputError(f"no {fields['answer']!r} text or no {fields['image']!r} image (see --caption_fields)")
    instruction = record.get(fields["instruction"]) or fields["instruction"]
    messages = [{"role": "user", "content": str(instruction)}, {"role": "assistant", "content": answer}]
    put_images_first(messages, len(images))
    return messages, images


NO_ANSWER = ": a test whose answers are kept secret (train_llava.infer asks it), or a file of answers that is not there"

# Of several formats in a folder the first one here is read, as of CC3M-595K: chat.json (llava), metadata.json (caption)
# A record has a format if it has its field; of some, all of several, which stand here with blanks between them
FORMATS: dict[str, tuple[str, Callable[[Record, Fields], Parsed]]] = {
    "llava": ("conversations", from_sharegpt_or_openai),
    "messages": ("messages", from_sharegpt_or_openai),
    "texts": ("texts", from_cauldron),
    "caption": ("answer", from_caption),
    "vqav2": ("data_subtype question_id question", from_benchmark("vqav2")),
    "textvqa": ("flickr_300k_url image_id question", from_benchmark("textvqa")),
    "gqa": ("imageId question", from_benchmark("gqa")),
    "docvqa": ("docId questionId question", from_benchmark("docvqa")),
    "chartqa": ("imgname query label", from_benchmark("chartqa")),
    "pope": ("question_id text image label", from_benchmark("pope")),
}


def recognise(records: list[Any], fields: Fields, names: Iterable[str] = ()) -> str | None:
    """The format of some records, by the fields that one of them has; None if no format matches.

    If `names` are given, only these are tried.
    """
    for name in names or FORMATS:
        if any(has_fields(record, name, fields) for record in records):
            return name
    return None


def has_fields(record: Any, name: str, fields: Fields) -> bool:
    """Whether a record has the fields of a format."""
    names = FORMATS[name][0].split()
    return isinstance(record, dict) and all(fields.get(field, field) in record for field in names)


def parse(record: Any, name: str, fields: Fields) -> Parsed:
    """Messages and images of one record.

    Raises:
        InputError: says why nothing can be learned from it.
    """
    if not has_fields(record, name, fields):
        raise InputError(f"not a record of the format {name!r}")
    if unknown := [field for field in record.keys() & UNKNOWN if record[field]]:
        raise InputError(f'the field "{unknown[0]}"; what it holds would not be seen')
    messages, images = FORMATS[name][1](record, fields)
    images = [to_image_ref(image) for image in images]
    check_conversation_size(messages)
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise InputError("no answer to learn from" + NO_ANSWER * (name in BENCHMARKS))
    roles = [message["role"] for message in messages]
    answers = [message["content"].strip() for i, message in enumerate(messages) if is_answer(roles, i)]
    if not all(answers) or not answers:
        raise InputError("an answer without words" if answers else "no answer to a question")
    if "system" in roles[1:]:
        raise InputError("a system message that is not the first")
    if any(message["role"] == "assistant" and IMAGE_TOKEN in message["content"] for message in messages):
        raise InputError(f"{IMAGE_TOKEN} inside an answer")
    placeholders = sum(message["content"].count(IMAGE_TOKEN) for message in messages)
    if placeholders != len(images):
        raise InputError(f"{placeholders} {IMAGE_TOKEN} in the text, {len(images)} images")
    if not all(isinstance(i, dict) and (i.get("bytes") or i.get("path")) for i in images):
        raise InputError("an image that is neither a file name nor the bytes of a file")
    if not all(isinstance(i.get("bytes"), bytes | None) and isinstance(i.get("path"), str | None) for i in images):
        raise InputError("an image whose bytes are no bytes, or whose path is no text")
    if sum(len(i.get("bytes") or b"") for i in images) > MOST_IMAGE_BYTES:
        raise InputError(f"more than {MOST_IMAGE_BYTES >> 20} MB of images")
    for text in (*(message["content"] for message in messages), *(i.get("path") or "" for i in images)):
        text.encode()  # a lone half of a surrogate pair, which JSON can hold, is no text
    return messages, images


def to_image_ref(image: Any) -> Any:
    """A file name, or the bytes of a file, as {"bytes", "path"}. Bytes may be written as base64, also after `data:`.

    Raises:
        InputError: what follows `data:` is not base64.
    """
    if isinstance(image, dict) and isinstance(image.get("bytes"), str):
        return {**image, "bytes": to_image_ref(image["bytes"]).get("bytes")}
    if not isinstance(image, str):
        return image
    data = image if IMAGE_IN_BASE64.fullmatch(image) else None
    try:
        if image.startswith("data:"):
            head, _, data = image.partition(",")
            if not head.endswith(";base64"):
                return {"bytes": unquote_to_bytes(data), "path": None}
        return {"bytes": base64.b64decode(data), "path": None} if data is not None else {"bytes": None, "path": image}
    except (binascii.Error, ValueError) as error:
        raise InputError(f"an image as {image[:20]}... that is no base64 ({error})") from error


def from_json(value: Any) -> Any:
    """The list of turns, parsed if it is stored as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        return json.loads(value)
    return value


def split_captions(record: Any, name: str, fields: Fields) -> Iterator[Any]:
    """Yields a record for each caption if an image has several; other records as they are."""
    captions = record.get(fields["answer"]) if name == "caption" and isinstance(record, dict) else None
    if not (isinstance(captions, list) and captions and all(isinstance(text, str) for text in captions)):
        yield record
        return
    for number, text in enumerate(captions):
        yield {**record, "id": f"{record.get('id', record.get(fields['image']))}#{number}", fields["answer"]: text}


def text_of_parts(parts: list[Any], images: list[Any]) -> str:
    """A list of parts as text, as content_parts.jinja writes it. Appends the images inside the parts to `images`."""
    text, after_image = "", False
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image", "image_url"):
            raise InputError(f"a part of type {kind!r}; known are text, image and image_url")
        is_image = kind != "text"
        if text and (is_image or after_image) and not text.endswith("\n"):
            text += "\n"
        text += IMAGE_TOKEN if is_image else str(part.get("text") or "")
        own = part.get(kind) if is_image else None
        if own := own.get("url") if kind == "image_url" and isinstance(own, dict) else own:
            images.append(own)
        after_image = is_image
    return text


def put_images_first(messages: list[Message], count: int) -> None:
    """Puts a placeholder for each image in front of the first question."""
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is not None:
        first["content"] = f"{IMAGE_TOKEN}\n" * count + first["content"]


def as_list(value: Any) -> list[Any]:
    """A value as a list: a single one as a list of one, None (or nothing but None) as an empty list."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return [] if all(each is None for each in values) else values
