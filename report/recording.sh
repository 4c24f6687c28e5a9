#!/usr/bin/env bash
# The recording at the top of the README: a client in a loop, three kills, and not a line of error. Runs a store of its own, which is
# gone afterwards. Build first: cargo build --release
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/target/release:$PATH"
directory=$(mktemp -d)
name=recording-$$

end() {
    kvs-tools --unix "$directory/sock" quit || true
    kvs-tools --name "$name" purge || true
    rm -rf "$directory"
}
trap 'end >/dev/null 2>&1' EXIT

kvs-front --name "$name" --listen 127.0.0.1:0 --unix "$directory/sock" --backup "$directory/backup" --console off \
    >"$directory/ready" 2>"$directory/log" &
# The shell is not to say that it was killed.
disown
for _ in {1..400}; do
    grep -qs '^ready' "$directory/ready" && break
    sleep 0.05
done
address=$(sed 's/.* tcp=\([^ ]*\) .*/\1/' "$directory/ready")

# The process that the store counts as its front, data or standby server; waits until there is one.
server() {
    local pid
    for _ in {1..400}; do
        pid=$(kvs-tools --unix "$directory/sock" stats --json | sed -n "s/.*\"$1_pid\": *\([0-9]*\).*/\1/p")
        [ -n "$pid" ] && break
        sleep 0.05
    done
    echo "$pid"
}

step=0
pauses --client "$address" | while IFS= read -r line; do
    echo "client: $line"
    step=$((step + 1))
    server standby >"$directory/standby"
    data=$(server data) front=$(server front)
    case $step in
    1) echo "        kill -9 $data, the data server" && kill -9 "$data" ;;
    2) echo "        kill -9 $front, the front server" && kill -9 "$front" ;;
    3) echo "        kill -9 $data $front, both at the same instant" && kill -9 "$data" "$front" ;;
    esac
done
