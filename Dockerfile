# Everything that training needs, for one kind of accelerator:
#
#     docker build --build-arg ACCELERATOR=tpu --tag mmcore_jax .       (or cuda, or cpu)
#     docker run --gpus all --shm-size=8g mmcore_jax --config=configs/stage2.py:RECIPE
ARG PYTHON=3.12
FROM python:${PYTHON}-slim
ARG ACCELERATOR=tpu

WORKDIR /mmcore_jax
# What is installed changes seldom: the layer survives changes of the code.
COPY setup.py pyproject.toml README.md LICENSE ./
COPY mmcore_jax/__init__.py mmcore_jax/
RUN extras=openmoji; [ "$ACCELERATOR" = cpu ] || extras="openmoji,$ACCELERATOR"; \
    pip install --no-cache-dir --editable ".[$extras]"
COPY . .

ENV MMCORE_JAX_IMAGE=${ACCELERATOR}
ENTRYPOINT ["bash", "-c", "exec bash launch/host.sh \"$MMCORE_JAX_IMAGE\" \"$@\"", "--"]
