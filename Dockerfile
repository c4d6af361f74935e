# docker build -t finescope:0.1.0 .
# The same image serves the head and the workers; nodes without a GPU run it too. Ray's version is the one in
# constraints.txt and the `rayVersion` of cluster/kuberay: a test keeps the three equal.
ARG CUDA_VERSION=13.0.2
ARG UBUNTU_VERSION=24.04

# The `base` flavour is enough: torch's wheels bring their own CUDA libraries.
FROM nvidia/cuda:${CUDA_VERSION}-base-ubuntu${UBUNTU_VERSION} AS builder
ARG PYTHON_VERSION=3.11
ARG RAY_VERSION=2.60.0
ARG EXTRAS=deepspeed,s3,gcs,azure
ENV UV_PYTHON_INSTALL_DIR=/opt/python \
    UV_NO_CACHE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    DS_BUILD_OPS=0 \
    PATH=/opt/venv/bin:${PATH}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install uv \
    && /opt/uv/bin/uv python install "${PYTHON_VERSION}" \
    && /opt/uv/bin/uv venv --seed --python "${PYTHON_VERSION}" /opt/venv
WORKDIR /build
# Dependencies first, with an empty package: a change of our code does not download torch again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir finescope \
    && touch finescope/__init__.py \
    && pip install --constraint constraints.txt "ray[data,train,default]==${RAY_VERSION}" ".[${EXTRAS}]"
COPY finescope finescope
RUN pip install --no-deps --force-reinstall . \
    && finescope --help > /dev/null

FROM nvidia/cuda:${CUDA_VERSION}-base-ubuntu${UBUNTU_VERSION} AS runtime
ARG RAY_VERSION=2.60.0
ARG FINESCOPE_VERSION=0.1.0
LABEL org.opencontainers.image.title="finescope" \
      org.opencontainers.image.description="Small language models for one domain: curate with sparse autoencoders, prune, distill." \
      org.opencontainers.image.version="${FINESCOPE_VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      io.ray.version="${RAY_VERSION}"
# wget: KubeRay's health probes call it. gcc: Triton compiles its launchers at run time. The profile line: KubeRay may start
# Ray in a login shell, which resets PATH.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 finescope \
    && useradd --uid 10001 --gid 10001 --create-home --shell /bin/bash finescope \
    && echo 'export PATH=/opt/venv/bin:$PATH' > /etc/profile.d/finescope.sh
COPY --from=builder /opt/python /opt/python
COPY --from=builder /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} \
    VIRTUAL_ENV=/opt/venv \
    PYTHONUNBUFFERED=1 \
    TOKENIZERS_PARALLELISM=false
WORKDIR /opt/finescope
COPY --chown=10001:10001 ray_jobs ray_jobs
# By number, so that Kubernetes can check runAsNonRoot.
USER 10001:10001
CMD ["finescope", "--help"]
