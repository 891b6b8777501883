# CPU:  docker build -t slimheads .
# GPU:  docker build -t slimheads:gpu --build-arg ACCELERATOR=gpu .
# Run:  docker run --rm -v "$PWD:/work" slimheads run recipe.yaml --out out
FROM python:3.11-slim

ARG ACCELERATOR=cpu
# The CPU build of torch is a tenth of the CUDA one. Export and proof run on the CPU; only ONNX Runtime uses the GPU.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /opt/slimheads
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY slimheads ./slimheads
# The lock is used as constraints only, so that the dependencies of the tests are not installed.
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" --constraint requirements.lock .
RUN if [ "$ACCELERATOR" = gpu ]; then \
        pip uninstall -y onnxruntime && pip install --no-cache-dir "onnxruntime-gpu[cuda,cudnn]>=1.24"; fi

RUN useradd --create-home --uid 1000 slimheads && mkdir /work && chown slimheads /work
USER slimheads
WORKDIR /work
VOLUME /work
ENTRYPOINT ["slimheads"]
