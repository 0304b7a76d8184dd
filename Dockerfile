FROM python:3.13-slim

COPY . /src
RUN --mount=type=cache,target=/root/.cache/pip pip install /src && rm -r /src

# The user is a default: docker-compose.yml runs as whoever owns the secrets. Hence a /data for everybody, in which
# that user makes a directory of their own, and USER for those who ask who they are without being in /etc/passwd.
RUN useradd --uid 1000 --no-create-home tuner && install --directory --mode=1777 /data
ENV HOME=/data USER=tuner TUNER_DATA_DIR=/data/tuner PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER tuner
VOLUME /data
WORKDIR /data

ENTRYPOINT ["tuner"]
