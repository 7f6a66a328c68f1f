# The command, with the pinned packages, as a user without rights. docs/docker.md has how it is used.
FROM python:3.12-slim

# Which PyTorch, as uv names them: cpu is small; with a GPU, cu128 or another.
ARG TORCH=cpu

# uv is the one that is pinned.
WORKDIR /src
COPY requirements.lock requirements-dev.lock ./
RUN pip install --no-cache-dir "$(grep '^uv==' requirements-dev.lock)" \
    && UV_TORCH_BACKEND=$TORCH uv pip install --system --no-cache --compile-bytecode -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY initflow initflow
COPY plugins plugins
RUN uv pip install --system --no-cache --no-deps --compile-bytecode . \
    && mkdir --mode=777 /work

# All that is kept goes to /work, also when the user has no name here: docker run --user.
WORKDIR /work
ENV HOME=/work \
    USER=initflow \
    MLFLOW_TRACKING_URI=sqlite:////work/mlflow.db
USER 1000:1000
ENTRYPOINT ["initflow"]
CMD ["--help"]
