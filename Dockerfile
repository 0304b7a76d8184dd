FROM python:3.13.9-slim-trixie

# What is not of its hash is not installed; docs/deployment.md says how the file is made.
COPY docker/constraints.txt /src/docker/constraints.txt
RUN --mount=type=cache,target=/root/.cache/pip pip install --require-hashes --requirement /src/docker/constraints.txt
COPY . /src
RUN pip install --no-deps --no-build-isolation --no-index /src && rm -r /src

# The user is a default: docker-compose.yml runs as whoever owns the secrets. Hence a /data for everybody, in which
# that user makes a directory of their own, and USER for those who ask who they are without being in /etc/passwd.
RUN useradd --uid 1000 --no-create-home tuner && install --directory --mode=1777 /data
ENV HOME=/data USER=tuner TUNER_DATA_DIR=/data/tuner PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER tuner
VOLUME /data
WORKDIR /data

ENTRYPOINT ["tuner"]
