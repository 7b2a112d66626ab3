# The test image: a fresh machine without a GPU on which both commands of the README run.
#   docker build --file docker/cpu.Dockerfile --tag swiftprune-cpu .
#   docker run --rm swiftprune-cpu
FROM python:3.11-bookworm

# Any version of a compiler will do.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends cmake make g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /swiftprune
COPY . .
RUN make setup

CMD ["make", "test"]
