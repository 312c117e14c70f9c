"""The run on a GPU that benchmarks/gpu.sh makes: all of it that needs no GPU."""

import json
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, SCRIPT_PATH, run

from benchmarks.full_size import gpu, model
from benchmarks.full_size.ladder import OFFLOAD, ROWS, rows
from benchmarks.full_size.process import MEASURED, RESULT, figures
from benchmarks.full_size.trace import read_trace
from benchmarks.full_size.verdict import verdict
from train_llava.build_model import build_llava
from train_llava.cli import InputError
from train_llava.data import LlavaCollator
from train_llava.model.backbones import load_tokenizer
from train_llava.model.load import load_processor
from train_llava.processing.chat import IGNORE_INDEX, ChatEncoder

KEPT = json.loads((ROOT / "benchmarks" / "results" / "gpu_dry_run.json").read_text())
PLAIN = "use_lora by Trainer, transformers' loss"
STEP = ("step_ms", "samples_per_second", "memory_gib", "kernel_ms", "kernels", "waits", "largest", "verdict", "loss")


# ---------------------------------------------------------------- a process for each measurement


def tells(tell, count):
    for i in range(count):
        tell("seen", i)


def breaks(tell, error):
    tell("seen", 1)
    raise error


def dies(tell):
    os.kill(os.getpid(), signal.SIGKILL)


def hangs_with_a_child(tell, file):
    if not os.fork():
        for _ in range(500):  # as a loader's worker that nobody ends; ten seconds at most
            file.write_text(str(time.time()))
            time.sleep(0.02)
        os._exit(0)
    tell("seen", 1)
    time.sleep(60)


def told(tmp_path, measure, *args, seconds=20):
    return [*figures(measure, *args, seconds=seconds, log=tmp_path / "log")]


def test_each_figure_comes_at_once(tmp_path):
    stream = figures(hangs_with_a_child, tmp_path / "file", seconds=20, log=tmp_path / "log")
    assert next(stream) == ("seen", 1)
    stream.close()
    assert told(tmp_path, tells, 3) == [("seen", 0), ("seen", 1), ("seen", 2), (RESULT, MEASURED)]


@pytest.mark.parametrize(
    "error, said",
    [
        (InputError("--use_liger_kernel true needs a GPU"), "refused: --use_liger_kernel true needs a GPU"),
        (ModuleNotFoundError("No module named 'trl'", name="trl"), "skipped: trl is not installed"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "failed: out of memory"),
        (ValueError("two\nlines"), "failed: ValueError: lines"),
        (SystemExit(2), "failed: SystemExit: 2"),
    ],
)
def test_why_a_row_has_no_figures(tmp_path, error, said):
    assert told(tmp_path, breaks, error) == [("seen", 1), (RESULT, said)]
    assert type(error).__name__ in (tmp_path / "log").read_text()


def test_a_process_that_dies(tmp_path):
    assert told(tmp_path, dies) == [(RESULT, "failed: ended with exit code -9")]


def test_what_a_measurement_has_started_ends_with_it(tmp_path):
    file = tmp_path / "file"
    assert told(tmp_path, hangs_with_a_child, file, seconds=0.5)[1:] == [
        (RESULT, "no time left: stopped after 0 seconds")
    ]
    before = file.read_text()
    time.sleep(0.2)
    assert file.read_text() == before


def test_no_row_is_begun_without_time(tmp_path, capsys):
    ladder = gpu.Ladder(tmp_path / "gpu.json", on_gpu=False)
    ladder.end = time.time() + gpu.LEAST - 1
    ladder.run()
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert list(kept["rows"]) == [row.name for row in ROWS]
    assert {row[RESULT] for row in kept["rows"].values()} == {"no time left"}


# ---------------------------------------------------------------- what the figures say


def event(name, category, start, duration, thread=1):
    return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": duration, "pid": 0, "tid": thread}


def test_a_trace_by_hand(tmp_path):
    """Two steps on a GPU, in microseconds; what is not the GPU's work is not counted."""
    events = [
        event("gemm", "kernel", 0, 3000),
        event("gemm", "kernel", 5000, 3000),
        event("add", "kernel", 3000, 1500),
        event("Memcpy HtoD", "gpu_memcpy", 4500, 500),
        event("cudaLaunchKernel", "cuda_runtime", 0, 10),
        event("cudaStreamSynchronize", "cuda_runtime", 10, 900),
        event("cudaStreamSynchronize", "cuda_runtime", 2000, 900),
        event("cudaDeviceSynchronize", "cuda_runtime", 4000, 900),
        event("aten::mm", "cpu_op", 0, 9000),
        {"ph": "i", "name": "an instant", "cat": "kernel", "ts": 0},
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    assert read_trace(tmp_path / "trace.json", steps=2) == {
        "kernel_ms": 4.0,
        "kernels": 2,
        "waits": {"cudaStreamSynchronize": 1.0, "cudaDeviceSynchronize": 0.5},
        "largest": {"gemm": "75.0%", "add": "18.8%", "Memcpy HtoD": "6.2%"},
    }


def test_a_trace_of_torch(tmp_path):
    """On a CPU an operation stands in for a kernel, without those that it calls."""
    one = torch.ones(3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(4):
            (one @ one).item()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    found = read_trace(tmp_path / "trace.json", steps=4)
    assert found["kernels"] == 2 and found["largest"].keys() == {"aten::matmul", "aten::item"}
    assert found["waits"] == {"aten::_local_scalar_dense": 1.0}


def test_a_trace_without_kernels_is_none(tmp_path):
    (tmp_path / "trace.json").write_text('{"traceEvents": []}')
    with pytest.raises(RuntimeError, match="saw no kernel"):
        read_trace(tmp_path / "trace.json", 3)


MACHINE = {"host_us_per_kernel": 12.0, "product_tflops": {"2480": 500.0, "9920": 600.0}, "peak_tflops": 989}
BEFORE = {"step_ms": 435, "kernel_ms": 143, "kernels": 6569, "waits": {"cudaStreamSynchronize": 5}, "tflop": 40}


@pytest.mark.parametrize(
    "machine, step, said",
    [
        ({}, {}, "host-bound: kernels take 143 of a step's 435 ms (33%), the host takes 12.0 us to start each of 6,569 "
                 "(slow: 3 to 5 are usual) and waits 5 times for the GPU"),
        ({"host_us_per_kernel": 4.0}, {}, "usual: 3 to 5"),
        ({"host_us_per_kernel": 7.0}, {}, "rather slow: 3 to 5"),
        # the GPU is busy nine tenths of the time; 40 TFLOP at 600 a second are 67 ms
        ({}, {"step_ms": 159}, "memory-bound: kernels take 143 of a step's 159 ms (90%), products take 47% of"),
        ({}, {"step_ms": 110, "kernel_ms": 100}, "compute-bound: kernels take 100 of a step's 110 ms (91%), products "
                                                 "take 67% of that time at the 600 TFLOP/s measured here"),
        ({"product_tflops": {"2480": 200.0, "9920": 250.0}}, {}, "; products reach only 25% of the peak: see nvid"),
    ],
)  # fmt: skip
def test_the_verdict(machine, step, said):
    assert said in verdict(MACHINE | machine, BEFORE | step)
    assert ("of the peak" in verdict(MACHINE | machine, BEFORE | step)) == ("product_tflops" in machine)


# ---------------------------------------------------------------- the rows


def test_freeze_vision_takes_the_host_where_the_gpu_is_too_small():
    used = {memory: [row.deepspeed for row in rows(memory)][-1] for memory in (79.1, 139.8)}
    assert used == {79.1: OFFLOAD, 139.8: "ds_zero2.json"} and rows(139.8) == [*ROWS]
    assert all((ROOT / row.deepspeed).is_file() for memory in used for row in rows(memory))


def test_the_model_is_the_one_that_would_be_built(tmp_path):
    built, processor = build_llava(*model.DEMO, torch.float32)
    model.lay_out_llava(tmp_path, *model.DEMO)
    random, laid_out = model.load_random(tmp_path)
    assert {n: (p.shape, p.dtype) for n, p in random.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in built.named_parameters()
    }
    unlike = {"dtype", "_name_or_path", "architectures", "transformers_version"}
    configs = [json.loads(each.config.to_json_string()) for each in (random, built)]
    for config in configs:
        for part in (config, config["text_config"], config["vision_config"]):
            for name in unlike & part.keys():
                part.pop(name)
    assert configs[0] == configs[1] and laid_out.chat_template == processor.chat_template
    assert random.generation_config.eos_token_id in built.generation_config.eos_token_id


def test_samples_are_as_long_as_with_the_real_tokenizer(tmp_path, qwen_tokenizer):
    model.lay_out_llava(tmp_path / "llava", *model.FULL_SIZE)
    model.write_images(tmp_path / "data", 30, files=2)
    qwen_tokenizer.save_pretrained(tmp_path / "qwen")
    qwen = ChatEncoder(load_tokenizer(tmp_path / "qwen"), 576, load_processor(tmp_path / "llava").chat_template)
    ours = LlavaCollator(load_processor(tmp_path / "llava")).encoder
    for record in json.loads((tmp_path / "data" / "chat.json").read_text()):
        question, answer = (turn["value"] for turn in record["conversations"])
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for encoder in (ours, qwen):
            ids, labels = encoder.encode(messages)
            assert (len(ids), sum(label != IGNORE_INDEX for label in labels)) == (626, 21)
    assert len([*(tmp_path / "data" / "images").iterdir()]) == 2


def filled(result):
    """Whether each row has all figures, or says by name why not."""
    assert result["note"].startswith("numbers mean nothing")
    assert list(result["rows"]) == [row.name for row in ROWS]
    assert result["diagnosis"][RESULT] == MEASURED and result["diagnosis"]["versions"]["torch"]
    for row, found in zip(rows(None), result["rows"].values(), strict=True):
        assert json.loads(json.dumps(asdict(row))).items() <= found.items()
        if "liger" in "".join(row.flags):
            assert found[RESULT].startswith("refused: --use_liger_kernel true needs a GPU")
        elif row.measure == "trl_steps":
            assert found[RESULT] in (MEASURED, "skipped: trl is not installed")
        elif row.measure == "answers":
            assert found[RESULT] == MEASURED
            assert min(found[f"tokens_per_second, {name}"] for name in ("train_llava", "transformers")) > 0
        else:
            assert found[RESULT] == MEASURED and {*STEP} <= found.keys()
            assert row.plain_loss or found["memory_gib_by_estimate"] > 0
    before, now = [*result["rows"].values()][:2]  # which PEFT's adapters and transformers' loss are really in
    assert now["kernels"] < before["kernels"] < result["rows"][PLAIN]["kernels"]
    return True


def test_the_kept_dry_run_has_all_rows():
    assert filled(KEPT)


@pytest.mark.slow
def test_the_dry_run_fills_all_rows(tmp_path):
    done = run("bash", ROOT / "benchmarks" / "gpu.sh", "--dry_run", "--json", tmp_path / "gpu.json", PATH=SCRIPT_PATH)
    assert done.returncode == 0 and filled(json.loads((tmp_path / "gpu.json").read_text()))
    losses = {row["loss"] for row in json.loads((tmp_path / "gpu.json").read_text())["rows"].values() if "loss" in row}
    assert max(losses) < 7 and Path(tmp_path / "gpu.log").stat().st_size


def test_without_a_gpu_it_says_what_to_do(capsys):
    with mock.patch("sys.argv", ["gpu"]), mock.patch("signal.signal"), pytest.raises(SystemExit, match="--dry_run"):
        gpu.main()
