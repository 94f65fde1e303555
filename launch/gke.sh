#!/usr/bin/env bash
# Trains on TPU slices of a Google Kubernetes Engine cluster, as a JobSet.
#
#   launch/gke.sh create --name=mine --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=4x4 \
#     --chips=4 -- python -m t2i_jax.main --config=... --workdir=gs://BUCKET/RUN
#
# Commands:
#   manifest  -- COMMAND: prints the manifest
#   create    -- COMMAND: gives it to the cluster
#   watch     the state of the JobSet and of its pods, until interrupted
#   logs      process 0's log, as it is written
#   delete    the JobSet
#
# The image is built from the Dockerfile beside this file. The cluster needs the JobSet controller,
# and node pools of the slices. A worker that fails starts all again, and the command goes on from its
# last checkpoint, unless it ended with status 2, of a wrong command.
#
# Flags:
#   --name=NAME         of the JobSet
#   --namespace=NAME    kubectl's own default otherwise
#   --image=IMAGE       with t2i_jax in it
#   --accelerator=NAME  the node pools' cloud.google.com/gke-tpu-accelerator
#   --topology=SHAPE    their cloud.google.com/gke-tpu-topology, such as 4x4 or 2x2x4
#   --chips=N           of each machine (4)
#   --slices=N          how many (1); the command then needs --config.mesh.slice=N
#   --spot              node pools of spot machines
#   --account=NAME      the Kubernetes service account that may use the bucket
#   --restarts=N        of all pods (100)
#   --notice=SECONDS    that the command has to save when its machine is taken away (30)
#   --env=NAME=VALUE    for the command; may be repeated
#   --dry-run           print the commands and run none
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

name="" namespace="" image="" accelerator="" topology="" chips=4 slices=1 spot="" account=""
restarts=100 notice=30
command=() environment=()
action=${1:---help}
[[ $action != --help ]] || set -- "$action" --help
flags "$0" "name namespace image accelerator topology chips slices spot? account restarts notice" "${@:2}"
given --name "$name"
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
  fail "--name=$name: Kubernetes takes small letters, digits and -, a letter first"
kubectl=(kubectl ${namespace:+--namespace="$namespace"})

# text WORD: as a string of YAML.
text() {
  local escaped=${1//\\/\\\\}
  escaped=${escaped//\"/\\\"} escaped=${escaped//$'\n'/\\n} escaped=${escaped//$'\r'/\\r}
  printf '"%s"' "${escaped//$'\t'/\\t}"
}

# literal WORD: the same, of which Kubernetes replaces nothing: it reads $(NAME), and $$ as one $.
literal() { text "${1//\$/\$\$}"; }

manifest() {
  local machines=1 side word
  for side in ${topology//x/ }; do machines=$((machines * side)); done
  ((machines % chips == 0)) || fail "--topology=$topology does not divide into machines of --chips=$chips"
  machines=$((machines / chips))
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(text "$name")
  annotations:
    # One slice, one node pool.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $machines
          completions: $machines
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              # A wrong command is not tried again.
              - action: FailJob
                onExitCodes: {containerName: train, operator: In, values: [2]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: $notice
YAML
  if [[ $account ]]; then echo "              serviceAccountName: $(text "$account")"; fi
  cat <<YAML
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(text "$accelerator")
                cloud.google.com/gke-tpu-topology: $topology
YAML
  if [[ $spot ]]; then
    cat <<YAML
                cloud.google.com/gke-spot: "true"
              tolerations:
                - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}
YAML
  fi
  cat <<YAML
              containers:
                - name: train
                  image: $(text "$image")
                  ports: [{containerPort: 8471}, {containerPort: 8080}]
                  resources: {limits: {google.com/tpu: $chips}}
                  env:
                    - {name: T2I_EXIT_STOPPED, value: "75"}
YAML
  for word in ${environment[@]+"${environment[@]}"}; do
    echo "                    - {name: ${word%%=*}, value: $(literal "${word#*=}")}"
  done
  echo "                  command:"
  for word in "${command[@]}"; do echo "                    - $(literal "$word")"; done
}

case $action in
  manifest | create)
    given --image "$image"
    given --accelerator "$accelerator"
    given --topology "$topology"
    [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || fail "--topology=$topology: write a shape, such as 4x4"
    whole --chips "$chips"
    whole --slices "$slices"
    whole --restarts "$restarts"
    whole --notice "$notice"
    ((${#command[@]})) || fail "no command; write it after --"
    made=$(manifest)
    if [[ $action == manifest ]]; then
      printf '%s\n' "$made"
    elif [[ $DRY_RUN ]]; then
      printf "%s <<'YAML'\n%s\nYAML\n" "$(quoted "${kubectl[@]}" apply --filename=-)" "$made"
    else
      found kubectl
      "${kubectl[@]}" apply --filename=- <<<"$made"
    fi
    ;;
  watch)
    found kubectl
    run "${kubectl[@]}" get jobset "$name"
    run "${kubectl[@]}" get pods --selector="jobset.sigs.k8s.io/jobset-name=$name" --watch
    ;;
  logs)
    found kubectl
    run "${kubectl[@]}" logs --follow \
      --selector="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    ;;
  delete) found kubectl; run "${kubectl[@]}" delete jobset "$name" ;;
  *) fail "unknown command '$action'; see $0 --help" ;;
esac
