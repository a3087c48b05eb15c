#!/usr/bin/env bash
# A worker of a plain Ray cluster, in the foreground.
#
#   worker.sh HEAD:6379 [OPTIONS OF ray start]
#
# It needs the head's token: copy ~/.ray/auth_token from there, or set RAY_AUTH_TOKEN. After SIGTERM
# its replicas finish their requests, while Serve starts others elsewhere; then it ends.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
address=${1:?name the address of the head: worker.sh HEAD:6379}
if [ -z "${RAY_AUTH_TOKEN:-}" ] && [ ! -s "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}" ]; then
    echo "There is no token: copy ~/.ray/auth_token from the head, or set RAY_AUTH_TOKEN." >&2
    exit 1
fi

# Ray's default is 30. It is a little more than `graceful_shutdown_timeout_s` of mixtral.yaml.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-645}"
exec ray start --address="$address" --block "${@:2}"
