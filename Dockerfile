# The GPU case: docker build -t spacedrive_jax . && docker run --gpus all --rm spacedrive_jax --version
# CUDA comes with the wheels; the host needs its driver (580 or newer) and the NVIDIA container toolkit.
FROM python:3.11-slim

WORKDIR /opt/spacedrive_jax
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
# Versions first: they change less often than the code, and the layer is kept.
COPY requirements.lock ./
RUN pip install -r requirements.lock "jax[cuda13]==0.10.2"
COPY . .
RUN pip install --no-deps .

# Data, runs and compiled programs are mounted: -v /data:/data -v $PWD/runs:/work/runs
WORKDIR /work
ENV JAX_COMPILATION_CACHE_DIR=/work/.xla
ENTRYPOINT ["spacedrive"]
CMD ["--help"]
