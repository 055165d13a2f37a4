#!/bin/sh
# The Secret that the manifests ask for, with random values, as YAML:
#   deploy/k8s/make-secrets.sh | kubectl apply --namespace penstock -f -
# Run it once: other passwords mean that NATS and every service have to be restarted together.
set -eu
# A letter first: NATS would take "12e5" for a number.
random() { printf 'p%s' "$(head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n')"; }
echo "apiVersion: v1"
echo "kind: Secret"
echo "metadata: {name: penstock-secrets}"
echo "stringData:"
for user in ingress scheduler discovery mirror register join auditor archive; do
  echo "  nats-$user: $(random)"
done
echo "  admin-token: $(random)"
echo "  block-hash-secret: $(random)"
