# vLLM's own GPU image and swiftprune: `vllm serve` on packed 2:4 checkpoints.
#   docker build --file docker/serve.Dockerfile --tag swiftprune-vllm .
#   docker run --gpus all --publish 8000:8000 --volume ./my-model-2of4:/model swiftprune-vllm /model
# Not run on a GPU yet (docs/gpu.md).
FROM vllm/vllm-openai:v0.32.0

WORKDIR /swiftprune
COPY . .
RUN python3 -m pip install --no-cache-dir .
WORKDIR /

ENTRYPOINT ["vllm", "serve"]
