# CPU:  docker build -t segdeconv .
# CUDA: docker build -t segdeconv --build-arg TORCH=https://download.pytorch.org/whl/cu128 .
# docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" segdeconv train dataset=folder dataset.root=mine
# With a GPU add --gpus all; many loader workers need --ipc host.
FROM python:3.12-slim
ARG TORCH=https://download.pytorch.org/whl/cpu
WORKDIR /opt/segdeconv
RUN pip install --no-cache-dir "torch>=2.10" "torchvision>=0.25" --index-url "$TORCH"
COPY pyproject.toml README.md LICENSE ./
COPY segdeconv segdeconv
COPY configs configs
COPY scripts scripts
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[export,serve]"
WORKDIR /data
USER 65534:65534
ENV HOME=/tmp
ENTRYPOINT ["segdeconv"]
CMD ["--help"]
