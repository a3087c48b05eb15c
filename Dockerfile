# syntax=docker/dockerfile:1
# One image for every endpoint: RunPod jobs (default), RunPod load balancing and plain HTTP.
#
#   docker build -t mixtral-serve .
#
# torch's default build is for CUDA 13: driver 580 or newer, Blackwell cards included. For hosts with
# an older driver choose a CUDA 12.6 build of the same version, which does not know Blackwell:
#
#   docker build --build-arg TORCH_INDEX_URL=<torch's cu126 index> --build-arg BNB_CUDA_VERSION=126 \
#     -t mixtral-serve:cu126 .
#
# With BAKE_MODEL the image holds a 4-bit copy of that checkpoint, 25 GB for Mixtral 8x7B, and needs
# no download, volume or token. The build downloads 93 GB and quantizes them on its CPUs:
#
#   docker build --build-arg BAKE_MODEL=mistralai/Mixtral-8x7B-Instruct-v0.1 \
#     --secret id=HF_TOKEN,env=HF_TOKEN -t mixtral-serve:baked .
#
# The last stage has what changes with the code in its last layers, so that a push after a change of
# code is small. Stages before it make what it copies: the code's own changes repeat them, and a
# result that is as before keeps its layer.
#
# The wheels carry CUDA's libraries, so a plain Python image is enough; the host brings the driver.
FROM python:3.12-slim-bookworm AS dependencies

ARG TORCH_INDEX_URL=""

# gcc: Triton builds its launchers at run time. tini: reaps Ray's children and passes signals on.
# wget: KubeRay's probes call it. rsync: `ray up` copies files into the container with it.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev rsync tini wget \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 serve
WORKDIR /app

# Dependencies first, from the same lock as everywhere: a change of our code rebuilds no layer here.
# A build of torch from TORCH_INDEX_URL has a local version, such as 2.13.0+cu126, which pip prefers.
COPY requirements.txt ./
RUN pip install --no-cache-dir ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} -r requirements.txt

# What pip has installed, as a CycloneDX bill of materials. The tool that writes it stays here.
FROM dependencies AS bill
RUN python -m venv /bill && /bill/bin/pip install --no-cache-dir cyclonedx-bom==7.5.0
RUN /bill/bin/cyclonedx-py environment --output-reproducible --output-file /sbom.cdx.json \
    "$(command -v python)"

# The package, installed in place: the entry runs from this folder. Only files that the installation
# reads are here, so that a change of other Python code does not compile the CPU's step again.
FROM dependencies AS installed
COPY pyproject.toml README.md LICENSE runpod_entry.py ./
COPY serve_app/__init__.py serve_app/
COPY serve_app/model/kernels/cpu/*.c serve_app/model/kernels/cpu/*.h serve_app/model/kernels/cpu/
RUN pip install --no-cache-dir --no-deps -e .

FROM installed AS project
COPY configs configs
COPY cluster/ray cluster/ray
COPY serve_app serve_app

# CUDA kernels, which a server would compile at its first start (7 s for each GPU): for compute
# capabilities such as "8.9 9.0", or all that this build of CUDA knows.
FROM project AS kernels
ARG CUDA_CAPABILITIES=""
# hadolint ignore=SC2086 # one argument for each capability
RUN mixtral-serve kernels /kernels $CUDA_CAPABILITIES

FROM project AS baking
ARG BAKE_MODEL=""
RUN mkdir /models
RUN --mount=type=secret,id=HF_TOKEN \
    if [ -n "$BAKE_MODEL" ]; then \
        HF_TOKEN="$(cat /run/secrets/HF_TOKEN 2>/dev/null || true)" && export HF_TOKEN \
        && HF_HOME=/tmp/hub mixtral-serve convert "$BAKE_MODEL" /models/baked; \
    fi

# The 4-bit copy alone, without the 93 GB that were downloaded. It can be an image of its own, which
# a later build takes in place of this stage: it downloads and quantizes nothing.
#
#   docker build --build-arg BAKE_MODEL=... --secret ... --target weights -t YOU/mixtral-weights .
#   docker build --build-arg BAKE_MODEL=... --build-context weights=docker-image://YOU/mixtral-weights .
FROM scratch AS weights
COPY --from=baking /models /models

FROM installed
COPY --from=bill /sbom.cdx.json /usr/share/doc/mixtral-serve/
COPY --from=weights /models /models
COPY --from=kernels --chown=serve:serve /kernels /home/serve/.cache/mixtral-serve/kernels
COPY docker-entrypoint.sh /usr/local/bin/
COPY --from=project /app ./
RUN chown serve:serve . /home/serve/.cache /home/serve/.cache/mixtral-serve

ARG BAKE_MODEL=""
# The library that bitsandbytes loads where it is imported; it must match torch's CUDA. An empty
# value is not allowed.
ARG BNB_CUDA_VERSION=130
# An empty value counts as unset. Clients keep the checkpoint's public name.
ENV MODEL_NAME=${BAKE_MODEL:+/models/baked} \
    SERVED_MODEL_NAME=${BAKE_MODEL}

# No folder for the volume: one that the image made would be there without a volume, too.
#
# RUNPOD_SERVERLESS       true takes jobs; false serves HTTP on PORT
# RUNPOD_*CHECK*          the SDK's checks import torch and open the GPU in the parent process
# RUNPOD_LOG_LEVEL        the SDK's default, DEBUG, prints what users wrote and what they got
# RAYON_NUM_THREADS       small containers have small thread limits
# RAY_memory_monitor_*    Ray counts the page cache of freshly read weights as memory in use
# hadolint ignore=DL3064 # no secret: it takes TOKENIZERS_PARALLELISM for one
ENV RUNPOD_SERVERLESS=true \
    SERVE_CONFIG=configs/runpod.yaml \
    RUNPOD_SKIP_AUTO_SYSTEM_CHECKS=true \
    RUNPOD_SKIP_GPU_CHECK=true \
    RUNPOD_LOG_LEVEL=INFO \
    BNB_CUDA_VERSION=${BNB_CUDA_VERSION} \
    TOKENIZERS_PARALLELISM=false \
    RAYON_NUM_THREADS=4 \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_memory_monitor_refresh_ms=0 \
    PYTHONUNBUFFERED=1

EXPOSE 8000
# Without -g: a signal is for the entry alone, which lets running jobs finish before it ends Ray.
# The container starts as root, gives folders of the volume to user serve, and runs as serve.
ENTRYPOINT ["tini", "--", "docker-entrypoint.sh"]
CMD ["python", "runpod_entry.py"]
