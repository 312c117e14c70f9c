"""The card of a run, and what of a run would be uploaded: read by the hub's own library, sent by its own client."""

import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import call
from hub import files_sent, stand_in
from huggingface_hub import ModelCard
from transformers import TrainerState

from train_llava import build_model, train
from train_llava.planning.arguments import LlavaTrainingArguments
from train_llava.training.model_card import built_card, card_header, held_out


def trained(llava, data, output, *flags):
    words = ["--model_name_or_path", llava, "--data_path", data, "--output_dir", output, "--train_type", "use_lora"]
    words += ["--max_steps", 2, "--use_cpu", "true", "--report_to", "none", "--per_device_train_batch_size", 4]
    return call(train.main, *words, *flags)


def test_what_is_pushed_is_the_whole_model_with_its_card(llava, data, tmp_path, monkeypatch):
    """And nothing that names folders of this machine but what an adapter finds its base by."""
    out, home = tmp_path / "out", str(tmp_path.parent)
    flags = ("--save_strategy", "steps", "--save_steps", 1, "--eval_data_path", data, "--sample_steps", 2)
    with stand_in(monkeypatch) as kept:
        done = trained(llava, data, out, *flags, "--push_to_hub", "true", "--hub_model_id", "me/mine")
    assert done.returncode == 0, done.stderr
    sent = files_sent(kept)
    assert sent == {name: (out / name).read_bytes() for name in sent}
    assert {"adapter_model.safetensors", "adapter_config.json", "processor_config.json", "curves.png"} <= sent.keys()
    assert "samples/step_000002.png" in sent and (out / "launch.log").is_file()
    assert not [name for name in sent if name.endswith((".log", ".bin", ".jsonl")) or "checkpoint" in name]
    assert {name for name, content in sent.items() if home.encode() in content} <= {
        "adapter_config.json",
        "adapter_base.json",
    }
    assert len({(out / name).stat().st_mode for name in sent}) == 1  # all may be read by whom one may be read
    assert [json.loads(body)["name"] for path, body in kept if path.endswith("/create")] == ["mine"]
    assert sum("/commit/" in path for path, _ in kept) == 1  # at the end
    card = ModelCard(sent["README.md"].decode())
    assert (card.data.library_name, card.data.base_model, card.data.datasets) == ("peft", None, None)
    assert 'model="me/mine")' in card.text and "\n# me/mine\n" in card.text
    assert "| held-out loss, at step 2 |" in card.text and "| held-out data | `" in card.text


@pytest.mark.parametrize("flags", [(), ("--hub_model_id", "me/my model"), ("--hub_model_id", "not/an/id")])
def test_a_push_that_cannot_be_is_refused_before_weights_are_loaded(llava, data, tmp_path, monkeypatch, flags):
    """Without a token, or with a name that the hub does not allow."""
    monkeypatch.setattr(train, "load", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    done = trained(llava, data, tmp_path / "out", "--push_to_hub", "true", *flags)
    reason = "--hub_model_id USER/NAME" if flags else "not logged in, or no network"
    assert done.returncode == 2 and reason in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()


def read(header):
    """As the hub's library reads it."""
    return ModelCard(header).data.to_dict()


def test_the_hub_finds_its_own_names_and_no_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mine").mkdir(parents=True)  # which an id might be called, too
    data = ["data/mine", "captions=some/captions:2", "some/captions", str(tmp_path / "data" / "mine")]
    header = read(card_header(["llava-hf/llava-1.5-7b-hf"], adapter=True, data=data))
    assert (header["base_model"], header["library_name"]) == ("llava-hf/llava-1.5-7b-hf", "peft")
    assert header["datasets"] == ["some/captions"] and "license" not in header
    for base in ("data/mine", str(tmp_path / "data" / "mine")):
        header = read(card_header([base], data=["data/mine"]))
        assert not {"base_model", "datasets", "license"} & header.keys() and header["library_name"] == "transformers"


def test_the_license_is_that_of_the_base(tmp_path):
    card = "---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\ntags: [x]\n---\n# Base\n"
    (tmp_path / "README.md").write_text(card)
    header = read(card_header([str(tmp_path)]))
    assert (header["license"], header["license_name"]) == ("other", "qwen") and "license_link" not in header
    assert header["tags"] == ["llava"]
    (tmp_path / "README.md").write_text(card.replace("LICENSE", "https://host/LICENSE"))
    assert read(card_header([str(tmp_path)]))["license_link"] == "https://host/LICENSE"
    card = "---\nlicense: mit\nbase_model: Qwen/Qwen2.5-7B\n---\n# As hf download brings a card, with its own base\n"
    (tmp_path / "README.md").write_text(card)
    header = read(card_header([str(tmp_path)]))
    assert header["license"] == "mit" and "base_model" not in header
    for broken in ("---\n: [\n---\n", "no YAML", "---\njust words\n---\n"):
        (tmp_path / "README.md").write_text(broken)
        assert "license" not in read(card_header([str(tmp_path)]))


def test_a_built_model_hands_on_where_it_is_from(old_clip, old_qwen, tmp_path, monkeypatch):
    """The card of a build says it; that of a training from there repeats it. The tower is an id of the hub, of which
    the cache has a card; the chat model is a folder."""
    snapshot = tmp_path / "cache" / "models--some--clip" / "snapshots" / "abc"
    for path, text in (
        (snapshot / "README.md", "---\nlicense: mit\n---\n"),
        (snapshot.parents[1] / "refs/main", "abc"),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    language = shutil.copytree(old_qwen, tmp_path / "qwen")
    (language / "README.md").write_text("---\nlicense: other\nlicense_name: tongyi-qianwen\n---\n")
    card = built_card("mine", "some/clip", str(language))
    assert "| `some/clip` | mit |" in card and "| `qwen` | tongyi-qianwen |" in card and str(tmp_path) not in card
    assert (read(card)["base_model"], read(card)["license_name"]) == ("some/clip", "tongyi-qianwen")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text(card)
    header = read(card_header([str(tmp_path / "mine")]))
    assert (header["base_model"], header["license"]) == ("some/clip", "other")
    where = ("--vision_model_name_or_path", old_clip, "--language_model_name_or_path", language)
    done = call(build_model.main, *where, "--output_dir", tmp_path / "built")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "built" / "README.md").read_text()
    assert f"| `{old_clip.name}` | its card names none |" in card and "| `qwen` | tongyi-qianwen |" in card


def test_the_figures_are_those_of_the_weights_that_are_saved(tmp_path):
    """Of the last step, or of the best one where that is loaded; times are no figures of a model."""
    args = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    logs = [{"step": 2, "eval_loss": 2.0, "eval_exact_match": 0.5, "eval_runtime": 1.0, "eval_samples_per_second": 3.0}]
    logs += [
        {"step": 2, "loss": 1.0},
        {"step": 4, "eval_loss": 1.0, "eval_exact_match": 0.25, "eval_steps_per_second": 1},
    ]
    state = TrainerState(log_history=logs, best_global_step=2)
    assert held_out(state, args) == (4, {"loss": 1.0, "exact_match": 0.25})
    best = SimpleNamespace(load_best_model_at_end=True)
    assert held_out(state, best) == (2, {"loss": 2.0, "exact_match": 0.5})
    assert held_out(TrainerState(log_history=logs[1:2]), args) == (0, {})
