# The image of the worker, whose command `worker monitor` is the monitor.
# To the patch, so that the same commit makes the same program.
FROM golang:1.26.8-alpine AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
# Render passes its own variables as build arguments; elsewhere: docker build --build-arg VERSION=v1.2.3
ARG VERSION
ARG RENDER_GIT_COMMIT
RUN CGO_ENABLED=0 go build -trimpath -buildvcs=false \
    -ldflags "-s -w -X github.com/carpool-go/carpool/worker/cli.buildVersion=${VERSION:-${RENDER_GIT_COMMIT:-docker}}" \
    -o /out/ ./cmd/worker

# A base with a shell: Render's Shell page, and `worker enqueue` in it, need one.
FROM alpine:3.22
RUN apk add --no-cache ca-certificates tzdata && adduser -D -u 10001 carpool
COPY --from=build /out/worker /usr/local/bin/
USER 10001
STOPSIGNAL SIGTERM
# Is for the worker, and reaches no further than its container. The monitor's is: worker health --monitor
ENV HEALTH_ADDR=127.0.0.1:8081
HEALTHCHECK --interval=10s --timeout=6s --start-period=70s --retries=3 CMD ["worker", "health"]
# No ENTRYPOINT, so that a command is written in full everywhere: worker migrate.
CMD ["worker", "run"]
