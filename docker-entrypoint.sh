#!/bin/sh
# The image's entry point: as root, it gives the server's folders on the network volume to the user
# that the server runs as, and then runs the command as that user. RunPod's volumes belong to root.
# A folder that stays unwritable is no error: the server says so and works without it.
# As any other user, it runs the command as it is.
user=serve
home=/home/serve

# Makes folder $1, and gives $user what it does not own in it. Other mounts below it stay as they are.
own() {
    mkdir -p "$1" && find "$1" -xdev ! -user "$user" -exec chown -h "$user:" {} +
}

prepare() {
    own "$1/huggingface-cache"
    own "$1/.mixtral-serve"
    own "$1/results"
}

as_user="setpriv --reuid=$user --regid=$(id -g "$user") --init-groups"

if [ "$(id -u)" = 0 ] && $as_user true; then
    {
        chosen="${MIXTRAL_RUNPOD__VOLUME:-${BASE_PATH:-}}"
        if [ -d "$chosen" ]; then prepare "$chosen"; fi
        for volume in /runpod-volume /workspace; do
            if mountpoint -q "$volume"; then prepare "$volume"; fi
        done
        for folder in "${MIXTRAL_MODEL__CACHE_DIR:-}" "${HF_HOME:-}" "${HF_HUB_CACHE:-}"; do
            if [ -n "$folder" ]; then own "$folder"; fi
        done
    } 2>/dev/null
    export HOME="$home"
    exec $as_user "$@"
fi
exec "$@"
