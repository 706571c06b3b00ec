# The trainer on a CPU, with compiled kernels: docker build -f examples/docker/cpu.Dockerfile -t vise_fast .
# docker run --rm -v "$PWD/runs:/work/runs" vise_fast train --run.dir runs/nano
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt ./
# torch's build for CPUs is smaller: --build-arg TORCH_INDEX=URL names the index that has it
ARG TORCH_INDEX=
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$(sed -n 's/^torch==//p' constraints.txt)"
COPY . .
RUN pip install --no-cache-dir -c constraints.txt .
WORKDIR /work
ENTRYPOINT ["vise-fast"]
CMD ["--help"]
