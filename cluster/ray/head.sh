#!/usr/bin/env bash
# The head of a plain Ray cluster, in the foreground. Its machine may have a GPU and replicas too.
#
#   head.sh [OPTIONS OF ray start]
#
# It makes Ray's token, ~/.ray/auth_token, unless there is one or RAY_AUTH_TOKEN is set. API_KEYS and
# HF_TOKEN have to be in the environment of head and workers. Then, on this machine:
#
#   RAY_AUTH_MODE=token serve deploy cluster/ray/mixtral.yaml
set -euo pipefail
source "$(dirname "$0")/environment.sh"
(umask 077 && ray get-auth-token --generate >/dev/null) # Ray would let every user read it
exec ray start --head --block --port=6379 --dashboard-host=127.0.0.1 "$@"
