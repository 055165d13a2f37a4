#!/bin/sh
# Etcd fails in ways that get worse, with requests going on all the while: one member, two of three, all of them
# with their data, an engine. It ends with the first request that fails. It needs the port-forward of the README.
#   deploy/k8s/overlays/etcd-discovery/failover.sh [URL]
set -eu
url=${1:-http://127.0.0.1:8080}
scenario=$(dirname "$0")/../../scenario.py
in_namespace() { kubectl --namespace penstock-etcd "$@"; }

one_member() { in_namespace delete pod penstock-etcd-2 --force; }
quorum() { in_namespace delete pod penstock-etcd-0 penstock-etcd-1 --force; }
all_and_their_data() {
  in_namespace scale statefulset penstock-etcd --replicas 0
  in_namespace delete pvc --selector app.kubernetes.io/component=etcd
  in_namespace scale statefulset penstock-etcd --replicas 3
}
an_engine_restarts() { in_namespace rollout restart deployment/registered-engine; }

for failure in one_member quorum all_and_their_data an_engine_restarts; do
  echo "== $failure"
  "$scenario" steady --url "$url" &
  load=$!
  "$failure"
  in_namespace rollout status statefulset/penstock-etcd --timeout 120s
  wait "$load"
done
"$scenario" first --url "$url"
