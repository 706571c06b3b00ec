# The trainer on an NVIDIA card: docker build -f examples/docker/cuda.Dockerfile -t vise_fast:cuda .
# docker run --rm --gpus all -v "$PWD:/work" -v "$HOME/.cache/huggingface:/root/.cache/huggingface" vise_fast:cuda \
#     train --config qwen3-vl-2b --data.dir photos
# torch's own wheel brings CUDA; the host needs the driver and the NVIDIA container toolkit, nothing else. Triton
# compiles its launchers with a C compiler at the first step, which is why the image keeps one.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir -c constraints.txt ".[quant]"
WORKDIR /work
ENTRYPOINT ["vise-fast"]
CMD ["--help"]
