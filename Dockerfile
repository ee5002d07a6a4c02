# jaxgpt for CPUs, GPUs or TPUs:
#   docker build -t jaxgpt .                            CPU
#   docker build -t jaxgpt --build-arg EXTRA=cuda .     NVIDIA GPUs; run it with --gpus all
#   docker build -t jaxgpt --build-arg EXTRA=tpu .      TPU VMs and GKE's TPU slices
#   docker run -v $PWD/runs:/work/runs jaxgpt pretrain --run runs/demo
# The wheels of JAX bring CUDA or libtpu along, so the base is plain Python.
FROM python:3.12-slim AS build
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir build && python -m build --wheel --outdir /wheel

FROM python:3.12-slim
ARG EXTRA=""
COPY --from=build /wheel /wheel
RUN wheel=$(ls /wheel/*.whl) \
    && pip install --no-cache-dir "$wheel[serve,log${EXTRA:+,$EXTRA}]" && rm -r /wheel
# Compiled programs outlive a container if this folder is a volume.
ENV JAX_COMPILATION_CACHE_DIR=/cache
WORKDIR /work
# SIGTERM reaches the command itself, which saves and ends.
ENTRYPOINT ["jaxgpt"]
CMD ["--help"]
