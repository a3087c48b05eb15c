# The scripts beside it source this file: variables that each process of the cluster needs.

export RAY_AUTH_MODE=token # Ray's ports take no call without the token
export RAY_USAGE_STATS_ENABLED=0
# HAProxy takes requests, with the limits that the README lists, and hands them to a replica itself.
export RAY_SERVE_ENABLE_HA_PROXY=1
RAY_SERVE_HAPROXY_BINARY_PATH=$(command -v mixtral-haproxy) || {
    echo "mixtral-haproxy is not on PATH: install mixtral-serve here, and activate its environment." >&2
    exit 1
}
export RAY_SERVE_HAPROXY_BINARY_PATH
# Serve starts a dead HAProxy again after three failed checks, by default 30 s.
export RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=2
export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve_app.api.guard:middlewares
