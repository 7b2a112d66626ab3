# The GPU suite: every check and measurement of the GPU backends (docs/gpu.md), on vLLM's image, which has a CUDA build of
# torch with cuSPARSELt and the Triton that belongs to it.
#   docker build --file docker/gpu.Dockerfile --tag swiftprune-gpu .
#   docker run --gpus all --volume ./results:/results swiftprune-gpu
# Not run on a GPU yet.
FROM vllm/vllm-openai:v0.32.0

WORKDIR /swiftprune
COPY . .
RUN python3 -m pip install --no-cache-dir .
WORKDIR /

# Exit code 1 when a check fails. Anything after the image's name replaces it: `vllm serve /model`, say.
ENTRYPOINT []
CMD ["swiftprune-bench", "gpu-suite", "--out", "/results"]
