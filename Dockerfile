# The image of the worker, whose command `worker monitor` is the monitor.
FROM golang:1.26-alpine AS build
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
# No ENTRYPOINT, so that a command is written in full everywhere: worker migrate.
CMD ["worker", "run"]
