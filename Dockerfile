# Everything but models and data.
#
#   docker build -t train_llava .
#   docker run --rm -it --gpus all --shm-size 8g -v "$PWD/output:/train_llava/output" train_llava
#
# That is the demo; -v "$PWD/models:/train_llava/models" and -v "$PWD/data:/train_llava/data" bring your own, and any
# command may stand at the end. Without a GPU, leave --gpus out and build a smaller one with
#
#   docker build -t train_llava --build-arg BASE=ubuntu:24.04 \
#       --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .
#
# PyTorch brings the CUDA that it runs on. The toolkit of this base compiles DeepSpeed's CPU Adam, which only
# ds_configs/zero2_offload.json needs. Of a base that has PyTorch, that one is used.
ARG BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04
FROM $BASE
SHELL ["bash", "-euo", "pipefail", "-c"]
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /train_llava
ENV PATH=/train_llava/.venv/bin:$PATH PIP_NO_CACHE_DIR=1
ARG PIP_EXTRA_INDEX_URL
# what changes rarely comes first, so that it is installed once
COPY requirements.txt constraints.txt ./
COPY scripts scripts
RUN source scripts/environment.sh && find_python requirements.txt
COPY . .
RUN python -m pip install --no-deps --no-build-isolation -e .
CMD ["bash", "run_zero2.sh"]
