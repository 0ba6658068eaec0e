# The GPU case: docker build -t spacedrive_jax . && docker run --gpus all --rm spacedrive_jax --version
# CUDA comes with the wheels; the host needs its driver (580 or newer) and the NVIDIA container toolkit.
# As oneself, with data, runs and compiled programs on the host:
#   docker run --gpus all --rm --user $(id -u):$(id -g) -v /data:/data -v $PWD/runs:/work/runs \
#       -v $HOME/.cache/spacedrive_jax:/work/.cache/spacedrive_jax spacedrive_jax train demo --data.records /data/records
# The data commands: docker run --entrypoint spacedrive-data-prep … (No test builds this file.)
FROM python:3.11-slim

WORKDIR /opt/spacedrive_jax
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
# Versions first: they change less often than the code, and the layer is kept.
COPY requirements.lock ./
RUN pip install -r requirements.lock "jax[cuda13]==0.10.2"
COPY . .
RUN pip install --no-deps .

# Whoever the container runs as has a home to write to.
WORKDIR /work
RUN chmod 1777 /work
ENV HOME=/work
ENTRYPOINT ["spacedrive"]
CMD ["--help"]
